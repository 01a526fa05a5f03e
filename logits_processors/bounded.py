# SPDX-License-Identifier: Apache-2.0
"""A length limit as part of the constraint.

ASAp and CARS sample texts that end by themselves, so a text that is cut off counts as a failure.
Saying so one token early, by allowing nothing but the end of text at the last position, spares the
step and lets the prefix trie learn it like any other refusal.
"""

from __future__ import annotations

from typing import Self

from typing_extensions import override

from .bitmask import Bitmask, empty, pack
from .constraint import Constraint
from .vocabulary import Vocabulary


class BoundedConstraint(Constraint):
    """``constraint`` restricted to texts of at most ``max_tokens`` tokens, end of text included.

    Args:
        constraint: the constraint to restrict, in any state.
        vocabulary: the table that it was compiled for.
        max_tokens: at least 1.

    Raises:
        ValueError: ``max_tokens`` is not positive.
    """

    def __init__(self, constraint: Constraint, vocabulary: Vocabulary, max_tokens: int) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens}: at least 1 is allowed")
        self._constraint = constraint
        self._vocabulary = vocabulary
        self._max_tokens = max_tokens

    @property
    @override
    def num_accepted(self) -> int:
        return self._constraint.num_accepted

    @property
    def _last(self) -> bool:
        return self.num_accepted >= self._max_tokens - 1

    @override
    def allows(self, token: int) -> bool:
        if self._last and token not in self._vocabulary.eos_ids:
            return False
        return self._constraint.allows(token)

    @override
    def accept(self, token: int) -> bool:
        if self._last and token not in self._vocabulary.eos_ids:
            return False
        return self._constraint.accept(token)

    @override
    def rollback(self, count: int) -> None:
        self._constraint.rollback(count)

    @override
    def mask(self) -> Bitmask | None:
        return self._end_of_text() if self._last else self._constraint.mask()

    @override
    def full_mask(self) -> Bitmask:
        return self._end_of_text() if self._last else self._constraint.full_mask()

    def _end_of_text(self) -> Bitmask:
        allowed = [eos for eos in self._vocabulary.eos_ids if self._constraint.allows(eos)]
        return pack(allowed, self._vocabulary.size) if allowed else empty(self._vocabulary.size)

    @override
    def complete(self) -> bool:
        return self._constraint.complete()

    @override
    def reset(self) -> None:
        self._constraint.reset()

    @override
    def fork(self) -> Self:
        return type(self)(self._constraint.fork(), self._vocabulary, self._max_tokens)
