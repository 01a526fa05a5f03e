# SPDX-License-Identifier: Apache-2.0
"""Drafts copied from what other requests were answered (SuffixDecoding, arXiv 2411.04975).

The continuations of a context in finished answers vote as in `proposers.suffix`. The text is kept
in two generations of half the budget each: when the young one is full the old one is dropped, so
memory is bounded and an answer lives for at least half a budget of newer ones.

What one user was answered then changes how fast another user's request is served (never what it is
answered), which can be measured: keep this off where users must not learn of one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from proposers.source import Candidates, VerifiedRows
from proposers.suffix import Context, History, SuffixSource

BYTES_PER_TOKEN = 512
"""Roughly what an indexed token costs: its places in three n-gram indexes."""

_SEPARATOR = -1
_TAIL = 12

_State: TypeAlias = tuple[Context, Context]


class PastSource:
    """Continuations of a context in the answers of finished requests.

    Args:
        vocab_size: tokens outside it are never drafted.
        max_bytes: memory for the text and its index.

    Raises:
        ValueError: for a budget that holds no two answers of 64 tokens.
    """

    def __init__(self, vocab_size: int, *, max_bytes: int) -> None:
        self._half = max_bytes // BYTES_PER_TOKEN // 2
        if self._half < 64:
            raise ValueError(
                f"past: max_bytes={max_bytes}; it must be at least {128 * BYTES_PER_TOKEN}"
            )
        self._rules = SuffixSource(vocab_size, max_length=_TAIL)
        self._young, self._old = History(()), History(())
        self._answers: dict[str, list[int]] = {}
        self._tails: dict[str, list[int]] = {}

    @property
    def tokens(self) -> int:
        """Tokens held in both generations."""
        return len(self._young.tokens) + len(self._old.tokens)

    def start(
        self, request: str, tokens: Sequence[int], *, greedy: bool, namespace: int = 0
    ) -> None:
        """Begin a request; what it has said before a restart counts as an answer."""
        self.stop(request)
        self._tails[request] = [int(t) for t in tokens[-_TAIL:]]
        self._answers[request] = self._tails[request][-4:]

    def extend(self, request: str, tokens: Sequence[int]) -> None:
        """Append committed tokens."""
        plain = [int(t) for t in tokens]
        self._answers[request] += plain
        self._tails[request] = (self._tails[request] + plain)[-_TAIL:]

    def stop(self, request: str) -> None:
        """The request's answer is complete; unknown ones are ignored."""
        self._tails.pop(request, None)
        answer = self._answers.pop(request, [])[-self._half + 1 :]
        if not answer:
            return
        if len(self._young.tokens) + len(answer) + 1 > self._half:
            self._old, self._young = self._young, History(())
        self._young.append([*answer, _SEPARATOR])

    def observe(self, rows: VerifiedRows) -> None:
        """Nothing to learn: the target's alternatives are not text."""

    def root(self, request: str) -> _State:
        """The committed context."""
        tail = self._tails[request]
        return self._rules.match(self._young, tail), self._rules.match(self._old, tail)

    def advance(self, state: _State, token: int) -> _State:
        """The context after one more token."""
        young, old = state
        return self._rules.advance(young, token), self._rules.advance(old, token)

    def candidates(self, state: _State) -> tuple[int, Candidates]:
        """What the generation with the longer match says, the younger one on a tie."""
        young, old = state
        return self._rules.candidates(young if young[3] >= old[3] else old)

    def prior(self, bucket: int, greedy: bool) -> float:
        """See `Source.prior`."""
        return 0.5 * self._rules.prior(bucket, greedy)
