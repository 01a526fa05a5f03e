# SPDX-License-Identifier: Apache-2.0
"""What a source of drafts is: given a context, which tokens may follow and how likely is each.

A source keeps whatever it needs per request and hands out *states*: opaque values that stand for
a context, namely a request's committed tokens followed by the drafted tokens on a path of its
tree. The grower starts from `root` and derives a child's state with `advance`, so a source can
work incrementally (move match pointers forward) instead of reading the context again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # sources work without torch
    from torch import Tensor

State: TypeAlias = Any
"""A context as one source sees it; only the source that made it looks inside."""

Candidates: TypeAlias = dict[int, float]
"""Token ids with their probabilities, which are positive and sum to at most 1."""


@dataclass(frozen=True, slots=True)
class VerifiedRows:
    """What the target model said in one step: R rows, drafted ones that were rejected included.

    Rows of rejected nodes come first and rows of the accepted path last: where two rows share a
    context the later one counts.

    Attributes:
        contexts: int64 [R, 2], the token before the row's token and the row's token itself
            (a negative id where there is none).
        top_ids: int64 [R, K], the target's K most probable next tokens.
        top_probs: float32 [R, K], their softmax probabilities at temperature 1.
        namespaces: int64 [R], which weights answered: the LoRA adapter's id, 0 without one.
    """

    contexts: NDArray[np.int64]
    top_ids: NDArray[np.int64]
    top_probs: NDArray[np.float32]
    namespaces: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.contexts)

    def cleaned(self, vocab_size: int) -> VerifiedRows:
        """The rows whose own token is in the vocabulary, with impossible successors at 0.

        Placeholders of multimodal inputs lie outside the vocabulary, and a NaN or a successor
        beyond the vocabulary (a padded output layer) must not enter a table.
        """
        last = self.contexts[:, 1]
        keep = (last >= 0) & (last < vocab_size)
        top_ids, top_probs = self.top_ids[keep], self.top_probs[keep]
        possible = (top_ids >= 0) & (top_ids < vocab_size) & (top_probs > 0)
        return VerifiedRows(
            self.contexts[keep],
            top_ids,
            np.where(possible, top_probs, np.float32(0)),
            self.namespaces[keep],
        )


class Source(Protocol):
    """Predicts next tokens. Token ids outside the vocabulary must be tolerated everywhere.

    Everything must be a deterministic function of the calls made: the ranks of a tensor-parallel
    group draft separately and must agree.
    """

    def start(
        self, request: str, tokens: Sequence[int], *, greedy: bool, namespace: int = 0
    ) -> None:
        """Begin a request (or begin it anew) with its prompt and what it has generated."""

    def extend(self, request: str, tokens: Sequence[int]) -> None:
        """Append tokens that were committed."""

    def stop(self, request: str) -> None:
        """Forget a request; unknown ones are ignored."""

    def observe(self, rows: VerifiedRows) -> None:
        """Learn from the target's own distributions; the rows have been `cleaned`."""

    def root(self, request: str) -> State:
        """The state of the committed context; valid until the next call that changes it."""

    def advance(self, state: State, token: int) -> State:
        """The state after one more token."""

    def candidates(self, state: State) -> tuple[int, Candidates]:
        """How far the source trusts itself here (a small bucket number), and its candidates."""

    def prior(self, bucket: int, greedy: bool) -> float:
        """Odds, before any feedback, that the source is right in this bucket (0: no opinion)."""


class StateSource(Source, Protocol):
    """A source that also looks at the target's hidden states."""

    def see(self, requests: Sequence[str], states: Tensor) -> None:
        """Take the target's last hidden state at the row that each newest token was drawn from.

        Called after a step's tokens were committed, for requests that were started.

        Args:
            requests: N ids.
            states: [N, D], in the target's dtype, on the CPU.
        """
