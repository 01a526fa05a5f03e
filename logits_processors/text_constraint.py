# SPDX-License-Identifier: Apache-2.0
"""Constraints on text: token bytes are assembled here, a language only ever sees whole characters.

A token may end inside a UTF-8 character. Such a tail is kept aside: it is refused when no character
begins with it, and shown to the language once it is complete.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field
from typing import Protocol

from typing_extensions import override

from .bitmask import Bitmask
from .constraint import Constraint, ConstraintError, check_rollback, scan
from .vocabulary import Vocabulary


class TextLanguage(Protocol):
    """A language given by two questions about a text."""

    def viable(self, text: str) -> bool:
        """Tell whether ``text`` may begin a member; must hold for each prefix of a viable text."""

    def member(self, text: str) -> bool:
        """Tell whether ``text`` is a member as it stands."""


def _decode(data: bytes) -> tuple[str, bytes] | None:
    """Split ``data`` into its whole characters and an unfinished tail; ``None`` if not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(data)
    except UnicodeDecodeError:
        return None
    return text, decoder.getstate()[0]


class TextConstraint(Constraint):
    """A :class:`~logits_processors.constraint.Constraint` over a :class:`TextLanguage`."""

    def __init__(self, language: TextLanguage, vocabulary: Vocabulary) -> None:
        self._language = language
        self._vocabulary = vocabulary
        self._text = ""
        self._tail = b""
        self._ended = False
        self._history: list[tuple[int, bytes]] = []

    @property
    @override
    def num_accepted(self) -> int:
        return len(self._history)

    @property
    def text(self) -> str:
        """The whole characters accepted so far."""
        return self._text

    def _after(self, token: int) -> tuple[str, bytes] | None:
        """Return the characters that ``token`` adds and the new tail, ``None`` if not allowed."""
        if self._ended or not 0 <= token < self._vocabulary.size:
            return None
        if token in self._vocabulary.eos_ids:
            return ("", b"") if self.complete() else None
        data = self._vocabulary.text_tokens[token]
        decoded = _decode(self._tail + data) if data else None
        if decoded is None or (decoded[0] and not self._language.viable(self._text + decoded[0])):
            return None
        return decoded

    @override
    def allows(self, token: int) -> bool:
        return self._after(token) is not None

    @override
    def accept(self, token: int) -> bool:
        after = self._after(token)
        if after is None:
            return False
        self._history.append((len(self._text), self._tail))
        self._text += after[0]
        self._tail = after[1]
        self._ended = token in self._vocabulary.eos_ids
        return True

    @override
    def rollback(self, count: int) -> None:
        check_rollback(count, len(self._history))
        if count:
            length, self._tail = self._history[-count]
            self._text = self._text[:length]
            self._ended = False
            del self._history[-count:]

    @override
    def mask(self) -> Bitmask | None:
        return None

    @override
    def full_mask(self) -> Bitmask:
        return scan(self, self._vocabulary)

    @override
    def complete(self) -> bool:
        return not self._tail and self._language.member(self._text)

    @override
    def reset(self) -> None:
        self.rollback(len(self._history))

    @override
    def fork(self) -> TextConstraint:
        copy = TextConstraint(self._language, self._vocabulary)
        copy._text, copy._tail, copy._ended = self._text, self._tail, self._ended
        copy._history = self._history.copy()
        return copy


@dataclass(frozen=True)
class CompiledTextConstraint:
    """A text language bound to a vocabulary; languages must be immutable or hold caches only.

    Raises:
        ConstraintError: not even the empty text is viable.
    """

    language: TextLanguage
    vocabulary: Vocabulary
    key: str
    name: str = field(default="text constraint")

    def __post_init__(self) -> None:
        if not self.language.viable(""):
            raise ConstraintError(
                f"{self.name} refuses the empty text, which begins every answer: its language is "
                "empty. A prefix check must hold for every prefix of a valid answer."
            )

    def start(self) -> TextConstraint:
        """Return a new state at the empty prefix."""
        return TextConstraint(self.language, self.vocabulary)
