# SPDX-License-Identifier: Apache-2.0
"""A draft model as one more source: it answers whole levels of tree nodes at once.

A forward pass over many nodes costs little more than one over a single node, so a model cannot be
asked node by node, as a `Source` is. A `LevelPredictor` takes the nodes of several requests in one
call. What it said is put into the states of a `ModelSource`, through which the mixture sees the
model as a source like the others, with weights that are learned online.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from proposers.source import Candidates, State, VerifiedRows

FAIR_DEBT = 16
"""Most tokens to read that one step is charged for: a prompt is read once, for a whole answer."""


@dataclass(frozen=True, slots=True)
class LevelNode:
    """A drafted token whose successors are wanted.

    Attributes:
        request: its id.
        node: a number that is unique within the request and step.
        parent: the number of the node before it, ``ROOT`` (-1) for the last committed token.
        token: the drafted token.
    """

    request: str
    node: int
    parent: int
    token: int


class LevelPredictor(Protocol):
    """Predicts the successors of many nodes in one pass."""

    def begin(self, requests: Sequence[str], *, trial: bool = False) -> dict[str, Candidates]:
        """Read what the requests committed since they were last read, and predict what follows.

        Nodes of earlier steps are forgotten.

        Args:
            requests: the ones that are asked about.
            trial: whether the model is only tried, so that nothing else is worth reading.

        Returns:
            The candidates after each request's last committed token, at temperature 1; a request
            that cannot be predicted is left out.
        """

    def debt(self, request: str) -> int:
        """Committed tokens that `begin` would have to read."""

    def room(self, request: str) -> int:
        """How many more nodes of the request `predict` can take in this step."""

    def predict(self, nodes: Sequence[LevelNode]) -> list[Candidates]:
        """Candidates after each node, at temperature 1.

        Args:
            nodes: each after its parent, which may be one of them or was given before.
        """

    def seconds(self, rows: int) -> float:
        """Expected time of a pass over `rows` tokens."""

    def slowdown(self) -> float:
        """Seconds by which the next step gets slower because the model is used, passes apart."""


class _Looked:
    """A context that the model may have been asked about."""

    __slots__ = ("found",)

    def __init__(self) -> None:
        self.found: Candidates = {}


class ModelSource:
    """What the model was asked, as a source; it answers nothing where it was not asked.

    The bucket is 0 there, and otherwise grows with the probability of the best candidate: how
    often a model is right depends above all on how sure it is.
    """

    def start(
        self, request: str, tokens: Sequence[int], *, greedy: bool, namespace: int = 0
    ) -> None:
        """See `Source.start`; the predictor has the text."""

    def extend(self, request: str, tokens: Sequence[int]) -> None:
        """See `Source.extend`; the predictor has the text."""

    def stop(self, request: str) -> None:
        """See `Source.stop`."""

    def observe(self, rows: VerifiedRows) -> None:
        """See `Source.observe`; a model's weights stay as they are."""

    def root(self, request: str) -> State:
        """See `Source.root`."""
        return _Looked()

    def advance(self, state: State, token: int) -> State:
        """See `Source.advance`."""
        return _Looked()

    def tell(self, state: State, found: Candidates) -> None:
        """Put the model's answer into a state that this source made."""
        state.found = found

    def candidates(self, state: State) -> tuple[int, Candidates]:
        """See `Source.candidates`."""
        found: Candidates = state.found
        if not found:
            return 0, found
        best = max(found.values())
        return 1 + sum(best >= edge for edge in _EDGES), found

    def prior(self, bucket: int, greedy: bool) -> float:
        """See `Source.prior`."""
        return (_ODDS_GREEDY if greedy else _ODDS_SAMPLED)[bucket]


_EDGES = (0.3, 0.6, 0.9)

# By bucket; rough: the mixture corrects them within tens of tokens.
_ODDS_GREEDY = (0.0, 1.5, 3.0, 6.0, 12.0)
_ODDS_SAMPLED = (0.0, 1.5, 2.5, 4.0, 6.0)
