# SPDX-License-Identifier: Apache-2.0
"""JSON schemas, EBNF grammars, regular expressions and structural tags through xgrammar.

xgrammar (arXiv 2411.15100) precomputes masks per grammar position, so the whole mask costs about as
much as a few token checks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from time import thread_time
from typing import Any, Literal, TypeAlias

import xgrammar
from typing_extensions import override

from .bitmask import Bitmask, empty
from .constraint import (
    Constraint,
    ConstraintError,
    ConstraintRuntimeError,
    check_rollback,
    constraint_key,
    place,
    refuse_if_empty,
)
from .limits import DEFAULT_LIMITS, Limits, check_source, limit_named
from .productivity import generates_nothing
from .vocabulary import Vocabulary

Kind: TypeAlias = Literal["json_schema", "ebnf", "regex", "structural_tag"]

_LOG_PREFIX = re.compile(r"\[\d\d:\d\d:\d\d\] \S+?:\d+: (Check failed: .*? is false: )?")
_REGEX_POSITION = re.compile(r"position (\d+)")
_GRAMMAR_OF_REGEX = re.compile(r"EBNF parser error at line \d+, column \d+: ")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_KNOWN_ESCAPES = "abcdDefnrsStuvwWx"  # xgrammar takes any other letter for itself, with a log line


class XGrammarConstraint(Constraint):
    """A :class:`~logits_processors.constraint.Constraint` over an xgrammar matcher.

    Nested repetitions and ambiguous recursion make each further token dearer, without bound. A call
    cannot be interrupted, but the first one that exceeds ``check_seconds`` of processor time ends
    the request, before the next one takes several times as long.
    """

    def __init__(self, matcher: Any, vocabulary: Vocabulary, check_seconds: float) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._check_seconds = check_seconds
        self._accepted = 0

    @property
    @override
    def num_accepted(self) -> int:
        return self._accepted

    @override
    def allows(self, token: int) -> bool:
        if not self._take(token):
            return False
        self._matcher.rollback(1)
        return True

    @override
    def accept(self, token: int) -> bool:
        if not self._take(token):
            return False
        self._accepted += 1
        return True

    @override
    def rollback(self, count: int) -> None:
        check_rollback(count, self._accepted)
        if count:
            self._matcher.rollback(count)
            self._accepted -= count

    @override
    def mask(self) -> Bitmask:
        mask = empty(self._vocabulary.size)
        if not self._matcher.is_terminated():
            start = thread_time()
            self._matcher.fill_next_token_bitmask(mask[None, :])
            self._check(start)
        return mask

    @override
    def full_mask(self) -> Bitmask:
        return self.mask()

    @override
    def complete(self) -> bool:
        return bool(self._matcher.is_completed())

    @override
    def reset(self) -> None:
        self._matcher.reset()
        self._accepted = 0

    @override
    def fork(self) -> XGrammarConstraint:
        copy = XGrammarConstraint(self._matcher.fork(), self._vocabulary, self._check_seconds)
        copy._accepted = self._accepted
        return copy

    def _take(self, token: int) -> bool:
        if not 0 <= token < self._vocabulary.size or not (
            self._vocabulary.text_tokens[token] or token in self._vocabulary.eos_ids
        ):
            return False  # xgrammar would refuse it too, with a line in the log each time
        start = thread_time()
        taken = bool(self._matcher.accept_token(token))
        try:
            self._check(start)
        except ConstraintRuntimeError:
            if taken:
                self._matcher.rollback(1)
            raise
        return taken

    def _check(self, start: float) -> None:
        spent = thread_time() - start
        if spent > self._check_seconds:
            raise ConstraintRuntimeError(
                f"xgrammar: a step after {self._accepted} tokens took {spent:.1f} s, allowed are "
                f"{self._check_seconds} s; simplify nested repetitions and ambiguous recursion "
                f"({limit_named('check_seconds')})"
            )


@dataclass(frozen=True)
class CompiledXGrammar:
    """A grammar compiled for a vocabulary."""

    grammar: Any = field(repr=False)
    vocabulary: Vocabulary = field(repr=False)
    key: str
    check_seconds: float

    def start(self) -> XGrammarConstraint:
        """Return a new state at the empty prefix."""
        matcher = xgrammar.GrammarMatcher(self.grammar)
        return XGrammarConstraint(matcher, self.vocabulary, self.check_seconds)


@lru_cache(maxsize=4)
def _compiler(vocabulary: Vocabulary) -> Any:
    info = xgrammar.TokenizerInfo(
        list(vocabulary.text_tokens),
        xgrammar.VocabType.RAW,
        vocab_size=vocabulary.size,
        stop_token_ids=list(vocabulary.eos_ids),
    )
    return xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)


def _parse_json(source: str, kind: str) -> Any:
    try:
        return json.loads(source)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConstraintError(f"{kind}: not valid JSON: {error}") from error


def _refuse_unknown_escapes(expression: str) -> None:
    for escape in _ESCAPE.finditer(expression):
        letter = escape.group(1)
        if letter.isascii() and letter.isalpha() and letter not in _KNOWN_ESCAPES:
            raise ConstraintError(
                f"regex: \\{letter} at {place(expression, escape.start())} is unknown to xgrammar, "
                f"which would match the letter {letter!r} itself; known are "
                f"{' '.join(chr(92) + known for known in _KNOWN_ESCAPES)}. The kind regex_partial "
                "takes all of the `regex` package's syntax"
            )


def _explain(error: Exception, kind: Kind, source: str) -> str:
    """Return xgrammar's message, with places in what the request holds."""
    message = " ".join(_LOG_PREFIX.sub("", str(error)).split())
    if kind != "regex":
        return message
    # A place in the grammar that xgrammar made of an expression says nothing about the expression.
    message = _GRAMMAR_OF_REGEX.sub("", message)
    return _REGEX_POSITION.sub(lambda found: place(source, int(found[1]) - 1), message, count=1)


def compile_xgrammar(
    kind: Kind, source: str, vocabulary: Vocabulary, limits: Limits = DEFAULT_LIMITS
) -> CompiledXGrammar:
    """Compile a constraint with xgrammar.

    Args:
        kind: what ``source`` is. JSON schemas get xgrammar's defaults, which are also those of
            vLLM's structured outputs: any white space, no properties beyond the schema's.
        source: a JSON schema or structural tag as JSON text, an EBNF grammar whose start rule is
            ``root``, or a regular expression without look-around and back-references.
        vocabulary: the model's vocabulary.
        limits: bounds on the text, checked before xgrammar sees it, and on each step.

    Raises:
        ConstraintError: a limit, a syntax error with xgrammar's line and column, a feature that
            xgrammar does not support, or an empty language.
    """
    compiler = _compiler(vocabulary)
    compilers: dict[str, Callable[[str], Any]] = {
        "json_schema": compiler.compile_json_schema,
        "ebnf": compiler.compile_grammar,
        "regex": compiler.compile_regex,
        "structural_tag": compiler.compile_structural_tag,
    }
    if kind not in compilers:
        raise ConstraintError(
            f"kind {kind!r} is unknown to xgrammar; known: {', '.join(compilers)}"
        )
    check_source(source, kind, limits)
    if kind in ("json_schema", "structural_tag"):
        _parse_json(source, kind)
    if kind == "regex":
        _refuse_unknown_escapes(source)
    try:
        grammar = compilers[kind](source)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConstraintError(f"{kind}: {_explain(error, kind, source)}") from error
    if generates_nothing(grammar.grammar.serialize_json()):
        raise ConstraintError(
            f"{kind}: no finite text belongs to the language, its recursion never ends; give the "
            "recursive rule an alternative without itself"
        )
    key = constraint_key(vocabulary, kind, source)
    compiled = CompiledXGrammar(grammar, vocabulary, key, limits.check_seconds)
    refuse_if_empty(compiled, kind)
    return compiled
