# SPDX-License-Identifier: Apache-2.0
"""Which tokens can finish a JSON text, found without parsing it.

A value in brackets, a string or a literal is final once it is closed; only a number can go on.
Finishing one that breaks its schema leads nowhere, so the token that does it has to be found among
a whole vocabulary, cheaply: it must close at least as many brackets as are open. The grammar of
JSON that is used here allows no white space behind the value.
"""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .vocabulary import Vocabulary

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*(?:"|\\?\Z)', re.DOTALL)
_CLOSING = b'}]"'
_LITERAL_ENDS = frozenset(
    literal[start:] for literal in (b"true", b"false", b"null") for start in range(len(literal))
)
_NEVER = 1 << 30


def is_final(text: bytes) -> bool:
    """Tell whether a complete JSON text, of which ``text`` is the end, cannot go on."""
    return not text[-1:].isdigit()


def open_brackets(text: bytes) -> int:
    """Return how many brackets are open behind ``text``, the beginning of a JSON text."""
    bare = _STRING.sub(b"", text)
    opened = bare.count(b"{") + bare.count(b"[")
    return opened - bare.count(b"}") - bare.count(b"]")


class FinishingTokens:
    """The tokens of a vocabulary that might finish a JSON text."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        ids, closers, literal = [], [], []
        for token, text in enumerate(vocabulary.text_tokens):
            ends_literal = text.lstrip(b" \t\r\n") in _LITERAL_ENDS
            if text and (text[-1] in _CLOSING or ends_literal):
                ids.append(token)
                closers.append(text.count(b"}") + text.count(b"]"))
                literal.append(ends_literal)
        self._ids = np.array(ids, dtype=np.int64)
        self._closers = np.array(closers, dtype=np.int64)
        # A bare literal finishes a text without brackets only.
        self._deepest = np.where(np.array(literal, dtype=np.bool_), 0, _NEVER)

    def at(self, depth: int) -> NDArray[np.int64]:
        """Return the ids that might finish a text with ``depth`` brackets open.

        Every token that finishes one is among them; most of them do not finish a given one.
        """
        return self._ids[(self._closers >= depth) & (self._deepest >= depth)]


@lru_cache(maxsize=4)
def finishing_tokens(vocabulary: Vocabulary) -> FinishingTokens:
    """Return the table of ``vocabulary``; to be kept, since looking it up hashes a vocabulary."""
    return FinishingTokens(vocabulary)
