# SPDX-License-Identifier: Apache-2.0
"""Regular expressions with look-around and back-references, through partial matching.

Mask engines compile an expression to an automaton, which look-around and back-references do not
have. The ``regex`` package answers the prefix question directly (``fullmatch(..., partial=True)``),
one candidate text at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import regex  # type: ignore[import-untyped]

from .constraint import ConstraintError, ConstraintRuntimeError, constraint_key, place
from .limits import DEFAULT_LIMITS, Limits, check_source, limit_named
from .relaxation import without_look_around
from .text_constraint import CompiledTextConstraint
from .vocabulary import Vocabulary

_LOOK_AROUND = ("(?=", "(?!", "(?<=", "(?<!", "(?>")
_END_SENSITIVE = ("$", r"\Z", r"\z", r"\b", r"\B", r"\m", r"\M", r"\X")
_FOLLOWERS = "a0 .-\n"


@dataclass(frozen=True)
class RegexLanguage:
    """The texts that an expression matches from end to end.

    Args:
        source: an expression in the ``regex`` package's syntax.
        timeout: seconds that one match may take.
    """

    source: str
    timeout: float

    @cached_property
    def _pattern(self) -> Any:
        return regex.compile(self.source)

    @cached_property
    def _relaxed(self) -> Any:
        source = without_look_around(self.source)
        if source is None or source == self.source:
            return None
        try:
            return regex.compile(source)
        except regex.error:  # taken out of its context, what is left need not be an expression
            return None

    @cached_property
    def _followers(self) -> str:
        """Characters to try behind a refused text, empty where a refusal is final.

        A partial match takes the end of the text so far for the end of the text wherever an anchor
        asks, so ``(?!a$)\\w+`` refuses the viable prefix ``a``. One more character, of those that
        the expression mentions or of each common class, settles what the anchor sees.
        """
        if not any(mark in self.source for mark in _END_SENSITIVE):
            return ""
        if not any(mark in self.source for mark in _LOOK_AROUND) and r"\B" not in self.source:
            return ""
        return "".join(dict.fromkeys(c for c in self.source + _FOLLOWERS if c not in "\\()?*+|^$"))

    def viable(self, text: str) -> bool:
        """Tell whether some continuation of ``text`` may match.

        Look-around makes this an over-approximation: a text may be viable and yet have no match.

        Raises:
            ConstraintRuntimeError: the match ran out of time.
        """
        if self._relaxed is not None and not self._matches(self._relaxed, text, partial=True):
            return False
        if self._matches(self._pattern, text, partial=True):
            return True
        return any(
            self._matches(self._pattern, text + char, partial=True) for char in self._followers
        )

    def member(self, text: str) -> bool:
        """Tell whether the expression matches all of ``text``.

        Raises:
            ConstraintRuntimeError: the match ran out of time.
        """
        return self._matches(self._pattern, text, partial=False)

    def _matches(self, pattern: Any, text: str, *, partial: bool) -> bool:
        try:
            match = pattern.fullmatch(text, partial=partial, timeout=self.timeout)
        except TimeoutError as error:
            raise ConstraintRuntimeError(
                f"regex {self.source!r}: matching {len(text)} characters took longer than "
                f"{self.timeout} s; rewrite nested repetitions ({limit_named('check_seconds')})"
            ) from error
        return match is not None


def compile_regex(
    source: str, vocabulary: Vocabulary, limits: Limits = DEFAULT_LIMITS
) -> CompiledTextConstraint:
    """Compile an expression.

    Raises:
        ConstraintError: a syntax error with its line and column, a limit, reverse matching
            (``(?r)``, whose partial matches are not prefixes), or a refusal of the empty prefix.
    """
    check_source(source, "regex", limits)
    language = RegexLanguage(source, limits.check_seconds)
    try:
        flags = language._pattern.flags
    except regex.error as error:
        where = place(source, error.pos or 0)
        raise ConstraintError(f"regex {source!r}: {error.msg} at {where}") from error
    except (RecursionError, OverflowError, MemoryError) as error:
        raise ConstraintError(f"regex {source!r} is too large to compile") from error
    if flags & regex.REVERSE:
        raise ConstraintError(
            f"regex {source!r}: (?r) matches from the end, so prefixes cannot be checked; remove it"
        )
    key = constraint_key(vocabulary, "regex (partial)", source)
    return CompiledTextConstraint(language, vocabulary, key, f"regex {source!r}")
