# SPDX-License-Identifier: Apache-2.0
"""Lark grammars through llguidance.

llguidance bounds its own work (lexer fuel, Earley items) and reports a spent bound as an error
state; here that becomes a refusal when compiling and a :class:`ConstraintRuntimeError` when
generating.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import llguidance
from llguidance._tokenizer import TokenizerWrapper
from typing_extensions import override

from .bitmask import Bitmask, empty, set_token
from .constraint import (
    Constraint,
    ConstraintError,
    ConstraintRuntimeError,
    check_rollback,
    constraint_key,
    refuse_if_empty,
)
from .lark_productivity import generates_nothing
from .limits import DEFAULT_LIMITS, Limits, check_source
from .vocabulary import Vocabulary

_PLACE = re.compile(r"^(?:at )?(\d+)\((\d+)\): ")


class LLGuidanceConstraint(Constraint):
    """A :class:`~logits_processors.constraint.Constraint` over an llguidance matcher."""

    def __init__(self, matcher: Any, vocabulary: Vocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._accepted: list[int] = []

    @property
    @override
    def num_accepted(self) -> int:
        return len(self._accepted)

    def _ended(self) -> bool:
        return bool(self._accepted) and self._accepted[-1] in self._vocabulary.eos_ids

    @override
    def allows(self, token: int) -> bool:
        if self._ended() or not 0 <= token < self._vocabulary.size:
            return False
        if token in self._vocabulary.eos_ids:
            return self.complete()
        if self._matcher.is_stopped():
            return False
        allowed = bool(self._matcher.validate_tokens([token]))
        self._check()
        return allowed

    @override
    def accept(self, token: int) -> bool:
        if not self.allows(token):
            return False
        if token not in self._vocabulary.eos_ids:
            self._matcher.consume_token(token)
            self._check()
        self._accepted.append(token)
        return True

    @override
    def rollback(self, count: int) -> None:
        check_rollback(count, len(self._accepted))
        if count:
            consumed = count - self._ended()
            del self._accepted[-count:]
            if consumed:
                self._matcher.rollback(consumed)
                self._check()

    @override
    def mask(self) -> Bitmask:
        mask = empty(self._vocabulary.size)
        if self._ended():
            return mask
        if not self._matcher.is_stopped():
            self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            self._check()
        complete = self.complete()
        for eos in self._vocabulary.eos_ids:
            set_token(mask, eos, complete)
        return mask

    @override
    def full_mask(self) -> Bitmask:
        return self.mask()

    @override
    def complete(self) -> bool:
        return bool(self._matcher.is_accepting())

    @override
    def reset(self) -> None:
        self._matcher.reset()
        self._accepted.clear()

    @override
    def fork(self) -> LLGuidanceConstraint:
        copy = LLGuidanceConstraint(self._matcher.deep_copy(), self._vocabulary)
        copy._accepted = self._accepted.copy()
        return copy

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintRuntimeError(f"lark: {_explain(self._matcher.get_error())}")


@dataclass(frozen=True)
class CompiledLark:
    """A Lark grammar compiled for a vocabulary."""

    matcher: Any = field(repr=False)
    vocabulary: Vocabulary = field(repr=False)
    key: str

    def start(self) -> LLGuidanceConstraint:
        """Return a new state at the empty prefix."""
        return LLGuidanceConstraint(self.matcher.deep_copy(), self.vocabulary)


class _ByteTokenizer:
    """The part of a tokenizer that llguidance asks for; it never needs to tokenize text here."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.eos_ids[0]
        self.bos_token_id = None
        self.tokens = [text or b"\xff<%d>" % i for i, text in enumerate(vocabulary.text_tokens)]
        self.special_token_ids = [i for i, text in enumerate(vocabulary.text_tokens) if not text]
        self._of_byte = {t[0]: i for i, t in enumerate(vocabulary.text_tokens) if len(t) == 1}

    def __call__(self, text: bytes | str) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        return [self._of_byte[byte] for byte in data if byte in self._of_byte]


@lru_cache(maxsize=4)
def _tokenizer(vocabulary: Vocabulary) -> Any:
    return llguidance.LLTokenizer(
        TokenizerWrapper(_ByteTokenizer(vocabulary)),
        n_vocab=vocabulary.size,
        eos_token=list(vocabulary.eos_ids),
    )


def _explain(message: str) -> str:
    message = message.split("\n<state>")[0].strip()
    return _PLACE.sub(r"line \1, column \2: ", message, count=1)


def compile_lark(
    source: str, vocabulary: Vocabulary, limits: Limits = DEFAULT_LIMITS
) -> CompiledLark:
    """Compile a Lark grammar whose start rule is ``start``.

    Raises:
        ConstraintError: a limit (llguidance's own ones included), a syntax error with its line and
            column, or an empty language.
    """
    check_source(source, "lark", limits)
    matcher = llguidance.LLMatcher(
        _tokenizer(vocabulary), llguidance.LLMatcher.grammar_from_lark(source), log_level=0
    )
    if matcher.is_error():
        raise ConstraintError(f"lark: {_explain(matcher.get_error())}")
    if generates_nothing(source):
        raise ConstraintError(
            "lark: no finite text belongs to the language, its recursion never ends; give the "
            "recursive rule an alternative without itself"
        )
    key = constraint_key(vocabulary, "lark", source)
    compiled = CompiledLark(matcher, vocabulary, key)
    try:
        refuse_if_empty(compiled, "lark")
    except ConstraintRuntimeError as error:
        raise ConstraintError(str(error)) from error
    return compiled
