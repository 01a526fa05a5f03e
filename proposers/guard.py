# SPDX-License-Identifier: Apache-2.0
"""A fence around a source: one failure, and it is out.

A source that raises, or that somebody else wrote and that answers with anything but a few token ids
of the vocabulary and their probabilities, is disabled for the rest of the engine's life, with one
error line. The drafts of the other sources go on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from proposers.source import Candidates, Source, State, StateSource, VerifiedRows

if TYPE_CHECKING:
    from torch import Tensor

MAX_CANDIDATES = 64
MAX_BUCKET = 15

_T = TypeVar("_T")
logger = logging.getLogger("vllm.vllm_ext")


class BadSourceError(ValueError):
    """A source's answer breaks the contract of `Source`."""


def checked_answer(answer: Any, vocab_size: int) -> tuple[int, Candidates]:
    """A source's bucket and candidates, if they are what `Source.candidates` promises.

    Raises:
        BadSourceError: saying what they are instead.
    """
    if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], dict)):
        raise BadSourceError(f"candidates() returned {_short(answer)}, not (bucket, dict)")
    bucket, found = answer
    if type(bucket) is not int or not 0 <= bucket <= MAX_BUCKET:
        raise BadSourceError(f"bucket {_short(bucket)}; it must be an int from 0 to {MAX_BUCKET}")
    if len(found) > MAX_CANDIDATES:
        raise BadSourceError(f"{len(found)} candidates; at most {MAX_CANDIDATES} are allowed")
    total = 0.0
    for token, prob in found.items():
        if type(token) is not int or not 0 <= token < vocab_size:
            raise BadSourceError(f"token id {_short(token)}; ints from 0 to {vocab_size - 1} exist")
        if not isinstance(prob, float) or not 0.0 < prob <= 1.0 + 1e-6:
            raise BadSourceError(f"probability {_short(prob)}; it must be a float in (0, 1]")
        total += prob
    if total > 1.0 + 1e-3:
        raise BadSourceError(f"probabilities that sum to {total:.3f}; at most 1 is allowed")
    return bucket, found


class GuardedSource:
    """A source that can fail without consequences but for its own drafts.

    Args:
        name: for the error line.
        source: the source to fence in.
        vocab_size: tokens outside it are an error; `None` trusts the source's answers, which costs
            no time.
        failed: names of the sources that have failed, shared by all fences of an engine. A source
            whose name is there is disabled from the start, so that a drafter that is built anew
            does not try it again.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        vocab_size: int | None,
        failed: set[str] | None = None,
    ) -> None:
        self._name = name
        self._failed = set() if failed is None else failed
        self._source: Source | None = None if name in self._failed else source
        self._vocab_size = vocab_size

    @property
    def disabled(self) -> bool:
        """Whether the source has failed."""
        return self._source is None

    def start(
        self, request: str, tokens: Sequence[int], *, greedy: bool, namespace: int = 0
    ) -> None:
        """See `Source.start`."""
        self._try(lambda s: s.start(request, tokens, greedy=greedy, namespace=namespace), None)

    def extend(self, request: str, tokens: Sequence[int]) -> None:
        """See `Source.extend`."""
        self._try(lambda s: s.extend(request, tokens), None)

    def stop(self, request: str) -> None:
        """See `Source.stop`."""
        self._try(lambda s: s.stop(request), None)

    def observe(self, rows: VerifiedRows) -> None:
        """See `Source.observe`."""
        self._try(lambda s: s.observe(rows), None)

    @property
    def watches(self) -> bool:
        """Whether the source is a `StateSource` that has not failed."""
        return hasattr(self._source, "see")

    def see(self, requests: Sequence[str], states: Tensor) -> None:
        """See `StateSource.see`."""
        if self.watches:
            self._try(lambda s: cast(StateSource, s).see(requests, states), None)

    def root(self, request: str) -> State:
        """See `Source.root`."""
        return self._try(lambda s: s.root(request), None)

    def advance(self, state: State, token: int) -> State:
        """See `Source.advance`."""
        source = self._source
        if source is None:
            return None
        try:  # here and in `candidates`, which are called per node, without `_try`: it takes time
            return source.advance(state, token)
        except Exception as error:
            self._disable(error)
            return None

    def candidates(self, state: State) -> tuple[int, Candidates]:
        """See `Source.candidates`; nothing once the source has failed."""
        source = self._source
        if source is None:
            return 0, {}
        try:
            answer = source.candidates(state)
            if self._vocab_size is None:
                return answer
            return checked_answer(answer, self._vocab_size)
        except Exception as error:
            self._disable(error)
            return 0, {}

    def prior(self, bucket: int, greedy: bool) -> float:
        """See `Source.prior`."""

        def ask(source: Source) -> float:
            odds = float(source.prior(bucket, greedy))
            if not (math.isfinite(odds) and odds >= 0.0):
                raise BadSourceError(f"prior() returned {odds}; it must be finite and not negative")
            return odds

        return self._try(ask, 0.0)

    def _try(self, call: Callable[[Source], _T], otherwise: _T) -> _T:
        if self._source is None:
            return otherwise
        try:
            return call(self._source)
        except Exception as error:
            self._disable(error)
            return otherwise

    def _disable(self, error: Exception) -> None:
        self._source = None
        self._failed.add(self._name)
        logger.error(
            "vllm-ext: source %r is disabled, it failed with %s: %s",
            self._name,
            type(error).__name__,
            error,
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
