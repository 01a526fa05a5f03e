# SPDX-License-Identifier: Apache-2.0
"""Does a Lark grammar generate any string at all?

llguidance compiles ``start: "a" start`` and shows nothing of what it made of it, so the grammar is
read once more here, as far as that question needs: which rules a rule cannot do without. The answer
is the fixed point of :mod:`logits_processors.productivity`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import TypeAlias

_TOKEN = re.compile(
    r"""
      (?P<skip>     [ \t]+ | (?:\#|//)[^\n]* )
    | (?P<newline>  (?:\r?\n)+[ \t]* )
    | (?P<json>     %(?:json|regex|llguidance)\b )
    | (?P<statement>%(?:ignore|import)\b )
    | (?P<rule>     !?[_?]?[a-z][_a-z0-9\-]* )
    | (?P<terminal> _?[A-Z][_A-Z0-9\-]*
                  | "(?:\\.|[^"\\])*"i?
                  | /(?:\\.|[^/\\])+/[imslux]*
                  | <[^<>\s]+>
                  | @[a-zA-Z0-9_\-]+ )
    | (?P<number>   [0-9]+ )
    | (?P<sign>     -> | \.\. | :(?!:) | [|()\[\]{}+*?~,=.&] )
    """,
    re.VERBOSE | re.DOTALL,
)


class _UnknownSyntaxError(Exception):
    """Syntax that this module does not read."""


@dataclass(frozen=True)
class _Sequence:
    parts: tuple[_Body, ...]


@dataclass(frozen=True)
class _Choice:
    parts: tuple[_Body, ...]


# What it takes to come to an end: nothing more, or that this rule does.
_ENDS = _Sequence(())
_Body: TypeAlias = str | _Sequence | _Choice


def generates_nothing(source: str) -> bool:
    """Tell whether no finite text belongs to a grammar.

    Args:
        source: a grammar that llguidance has compiled. Terminals, and rules with attributes, count
            as productive; so does everything in a grammar with syntax that this module does not
            know: the answer ``True`` is certain, ``False`` is not.
    """
    try:
        rules = _Reader(source).read()
    except (_UnknownSyntaxError, ValueError, IndexError, RecursionError):
        return False
    open_rules = dict.fromkeys(reversed(rules))  # rules mostly build on those that follow
    size = 0
    while size != len(open_rules):
        size = len(open_rules)
        for name in list(open_rules):
            if _ends(rules[name], open_rules):
                del open_rules[name]
    return "start" in open_rules


def _ends(body: _Body, open_rules: Container[str]) -> bool:
    """Tell whether ``body`` comes to an end without a rule of ``open_rules``."""
    if isinstance(body, str):
        return body not in open_rules
    parts = (_ends(part, open_rules) for part in body.parts)
    return all(parts) if isinstance(body, _Sequence) else any(parts)


class _Reader:
    """Recursive descent over the tokens of a grammar."""

    def __init__(self, source: str) -> None:
        self._tokens = [*_tokens(source), ("newline", "")]
        self._at = 0

    def read(self) -> dict[str, _Body]:
        """Return the bodies of all rules."""
        rules: dict[str, _Body] = {}
        while self._at < len(self._tokens):
            kind, text = self._next()
            if kind == "rule":
                name = text.lstrip("!?")
                if name in rules:
                    raise _UnknownSyntaxError(text)
                known = not self._skip_attributes()
                self._expect(":")
                body = self._choice()
                rules[name] = body if known else _ENDS
                self._expect_newline()
            elif kind in ("terminal", "statement"):
                while self._take_continuation() or self._next()[0] != "newline":
                    pass
            elif kind not in ("newline", "json"):
                raise _UnknownSyntaxError(text)
        return rules

    def _choice(self) -> _Body:
        parts = [self._sequence()]
        while self._take("|") or self._take_continuation():
            parts.append(self._sequence())
        return _Choice(tuple(parts))

    def _sequence(self) -> _Body:
        parts: list[_Body] = []
        while (text := self._peek()) not in ("|", ")", "]") and self._kind() != "newline":
            if text == "->":
                self._at += 2
                break
            parts.append(self._quantified())
        return _Sequence(tuple(parts))

    def _quantified(self) -> _Body:
        body = self._atom()
        if self._take("*") or self._take("?"):
            return _ENDS
        if self._take("~"):
            least = self._number()
            if self._take(".."):
                self._number()
            return body if least else _ENDS
        if self._take("{"):
            least = 0 if self._peek() == "," else self._number()
            if self._take(",") and self._peek() != "}":
                self._number()
            self._expect("}")
            return body if least else _ENDS
        self._take("+")
        return body

    def _atom(self) -> _Body:
        kind, text = self._next()
        if text == "(":
            body = self._choice()
            self._expect(")")
            return body
        if text == "[":
            self._choice()
            self._expect("]")
            return _ENDS
        if kind == "rule":
            return text
        if kind == "terminal" and self._take(".."):
            self._next()
        elif kind not in ("terminal", "json"):
            raise _UnknownSyntaxError(text)
        return _ENDS

    def _skip_attributes(self) -> bool:
        if not self._take("["):
            return False
        while self._next()[1] != "]":
            pass
        return True

    def _number(self) -> int:
        return int(self._next()[1])

    def _take_continuation(self) -> bool:
        """Take the ``|`` that begins the next line."""
        if self._kind() == "newline" and self._tokens[self._at + 1 : self._at + 2] == [_BAR]:
            self._at += 2
            return True
        return False

    def _take(self, text: str) -> bool:
        if self._kind() == "sign" and self._peek() == text:
            self._at += 1
            return True
        return False

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise _UnknownSyntaxError(self._peek())

    def _expect_newline(self) -> None:
        if self._next()[0] != "newline":
            raise _UnknownSyntaxError(self._peek())

    def _kind(self) -> str:
        return self._tokens[self._at][0]

    def _peek(self) -> str:
        return self._tokens[self._at][1]

    def _next(self) -> tuple[str, str]:
        if self._at == len(self._tokens):
            raise _UnknownSyntaxError("the end")
        self._at += 1
        return self._tokens[self._at - 1]


_BAR = ("sign", "|")


def _tokens(source: str) -> Iterator[tuple[str, str]]:
    position = 0
    while position < len(source):
        match = _TOKEN.match(source, position)
        if match is None or match.lastgroup is None:
            raise _UnknownSyntaxError(source[position : position + 10])
        position = match.end()
        if match.lastgroup == "json":
            while source[position].isspace():
                position += 1
            position = json.JSONDecoder().raw_decode(source, position)[1]
        if match.lastgroup != "skip":
            yield match.lastgroup, match.group()
