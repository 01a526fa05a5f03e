# SPDX-License-Identifier: Apache-2.0
"""JSON schemas checked by a validator, for what mask engines cannot express.

Engines that compile a schema to a mask leave out keywords (``not``, ``uniqueItems``, ``contains``,
``dependentSchemas``, ...) or narrow the language (property order, no further properties). Here the
grammar of JSON gives the masks and the ``jsonschema`` package decides whether a text may end, so
the language is the schema's own. A violation shows only when the value would be finished, where the
token that finishes it is refused: an object may go on to what it lacks, but what it has stays. The
samplers that weigh or restart (AWRS with SMC, ASAp, CARS) are made for that, plain masking is not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import regex  # type: ignore[import-untyped]
from jsonschema.validators import extend, validator_for  # type: ignore[import-untyped]
from referencing.exceptions import Unresolvable
from referencing.jsonschema import EMPTY_REGISTRY
from typing_extensions import override

from .bitmask import Bitmask, set_token, unpack
from .constraint import Constraint, ConstraintError, ConstraintRuntimeError, constraint_key
from .json_closing import FinishingTokens, finishing_tokens, is_final, open_brackets
from .limits import DEFAULT_LIMITS, Limits, check_source, limit_named
from .vocabulary import Vocabulary
from .xgrammar_constraint import CompiledXGrammar, XGrammarConstraint, compile_xgrammar

_MAX_INT_DIGITS = 1000
_VERDICTS = 64


class JsonValidateConstraint(Constraint):
    """A :class:`~logits_processors.constraint.Constraint`: JSON by mask, the schema at the end."""

    def __init__(
        self,
        grammar: XGrammarConstraint,
        validator: Any,
        vocabulary: Vocabulary,
        finishing: FinishingTokens,
    ) -> None:
        self._grammar = grammar
        self._validator = validator
        self._vocabulary = vocabulary
        self._finishing = finishing
        self._tokens: list[int] = []
        self._verdicts: dict[bytes, bool] = {}

    @property
    @override
    def num_accepted(self) -> int:
        return len(self._tokens)

    @override
    def allows(self, token: int) -> bool:
        if token in self._vocabulary.eos_ids:
            return self._open() and self.complete()
        if not self.accept(token):
            return False
        self.rollback(1)
        return True

    @override
    def accept(self, token: int) -> bool:
        if token in self._vocabulary.eos_ids and not (self._open() and self.complete()):
            return False
        if not self._grammar.accept(token):
            return False
        self._tokens.append(token)
        ended = token in self._vocabulary.eos_ids
        if ended or not self._grammar.complete() or not is_final(self._spelling(token)):
            return True
        try:
            valid = self._is_valid(self._text())
        except ConstraintRuntimeError:
            self.rollback(1)
            raise
        if not valid:
            self.rollback(1)
        return valid

    @override
    def rollback(self, count: int) -> None:
        self._grammar.rollback(count)
        if count:
            del self._tokens[-count:]

    @override
    def mask(self) -> Bitmask:
        mask = self._grammar.mask()
        if not self._open():
            return mask
        may_end = self.complete()
        for eos in self._vocabulary.eos_ids:
            set_token(mask, eos, may_end)
        finishing = self._finishing.at(open_brackets(self._text()))
        for token in finishing[unpack(mask, self._vocabulary.size)[finishing]].tolist():
            if not self.allows(token):
                set_token(mask, token, False)
        return mask

    @override
    def full_mask(self) -> Bitmask:
        return self.mask()

    @override
    def complete(self) -> bool:
        return self._grammar.complete() and self._is_valid(self._text())

    @override
    def reset(self) -> None:
        self.rollback(len(self._tokens))

    @override
    def fork(self) -> JsonValidateConstraint:
        copy = JsonValidateConstraint(
            self._grammar.fork(), self._validator, self._vocabulary, self._finishing
        )
        copy._tokens = self._tokens.copy()
        return copy

    def _open(self) -> bool:
        return not self._tokens or self._tokens[-1] not in self._vocabulary.eos_ids

    def _spelling(self, token: int) -> bytes:
        return self._vocabulary.text_tokens[token]

    def _text(self) -> bytes:
        return self._vocabulary.spell(self._tokens)

    def _is_valid(self, text: bytes) -> bool:
        # Asked when a token is checked, again when it is accepted, and again for the end of text.
        if text not in self._verdicts:
            if len(self._verdicts) >= _VERDICTS:
                self._verdicts.clear()
            self._verdicts[text] = self._validate(text)
        return self._verdicts[text]

    def _validate(self, text: bytes) -> bool:
        try:
            value = json.loads(text, parse_int=_parse_int)
        except (ValueError, RecursionError):
            return False
        try:
            return bool(self._validator.is_valid(value))
        except RecursionError:
            return False
        except Unresolvable as error:
            raise ConstraintRuntimeError(
                f"json_validate: unresolvable reference: {error}"
            ) from error


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_INT_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


class _Keywords:
    """The keywords with regular expressions, given a time limit that Python's ``re`` lacks."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout

    def all(self) -> dict[str, Any]:
        """Return the keyword functions by name, as ``jsonschema.validators.extend`` takes them."""
        return {
            "pattern": self._pattern,
            "patternProperties": self._pattern_properties,
            "additionalProperties": self._additional_properties,
        }

    def _search(self, pattern: str, text: str) -> bool:
        try:
            return regex.search(pattern, text, timeout=self._timeout) is not None
        except TimeoutError as error:
            raise ConstraintRuntimeError(
                f"json_validate: pattern {pattern!r} took longer than {self._timeout} s on "
                f"{len(text)} characters ({limit_named('check_seconds')})"
            ) from error

    def _pattern(self, validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[Any]:
        if validator.is_type(value, "string") and not self._search(pattern, value):
            yield jsonschema.ValidationError(f"{value!r} does not match {pattern!r}")

    def _pattern_properties(
        self, validator: Any, patterns: dict[str, Any], value: Any, schema: Any
    ) -> Iterator[Any]:
        if validator.is_type(value, "object"):
            for pattern, subschema in patterns.items():
                for name, member in value.items():
                    if self._search(pattern, name):
                        yield from validator.descend(member, subschema, path=name)

    def _additional_properties(
        self, validator: Any, subschema: Any, value: Any, schema: dict[str, Any]
    ) -> Iterator[Any]:
        if not validator.is_type(value, "object"):
            return
        named, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
        for name, member in value.items():
            if name not in named and not any(self._search(p, name) for p in patterns):
                yield from validator.descend(member, subschema, path=name)


@dataclass(frozen=True)
class CompiledJsonValidate:
    """A schema bound to a vocabulary."""

    grammar: CompiledXGrammar = field(repr=False)
    validator: Any = field(repr=False)
    vocabulary: Vocabulary = field(repr=False)
    key: str
    finishing: FinishingTokens = field(repr=False)

    def start(self) -> JsonValidateConstraint:
        """Return a new state at the empty prefix."""
        return JsonValidateConstraint(
            self.grammar.start(), self.validator, self.vocabulary, self.finishing
        )


def compile_json_validate(
    source: str, vocabulary: Vocabulary, limits: Limits = DEFAULT_LIMITS
) -> CompiledJsonValidate:
    """Compile a schema for validation.

    The dialect is the one that ``$schema`` names, draft 2020-12 without it. Only references inside
    the schema are followed; nothing is fetched. ``format`` is an annotation, as the specification
    has it.

    Args:
        source: the schema as JSON text.
        vocabulary: the model's vocabulary.
        limits: bounds checked before the schema is parsed.

    Raises:
        ConstraintError: a limit, text that is not JSON, a value that is no schema, a reference
            outside the schema, or a schema that nothing satisfies (``false``).
    """
    check_source(source, "json_validate", limits)
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise ConstraintError(f"json_validate: not valid JSON: {error}") from error
    if not isinstance(schema, dict | bool):
        raise ConstraintError(
            f"json_validate: a schema is an object or a boolean, given {type(schema).__name__}"
        )
    if schema is False:
        raise ConstraintError("json_validate: the schema `false` is satisfied by nothing")
    dialect = validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        # Without its formats: they judge patterns by Python's `re`, which knows no \p{L}.
        dialect.check_schema(schema, format_checker=jsonschema.FormatChecker(()))
        _check_patterns(schema)
    except jsonschema.SchemaError as error:
        raise ConstraintError(f"json_validate: at {error.json_path}: {error.message}") from error
    except RecursionError as error:
        raise ConstraintError("json_validate: the schema nests too deeply to be checked") from error
    validator = extend(dialect, _Keywords(limits.check_seconds).all())(
        schema, registry=EMPTY_REGISTRY
    )
    grammar = compile_xgrammar("json_schema", json.dumps(_outline(schema)), vocabulary, limits)
    key = constraint_key(vocabulary, "json_validate", source)
    finishing = finishing_tokens(vocabulary)
    return CompiledJsonValidate(grammar, validator, vocabulary, key, finishing)


def _outline(schema: Any) -> dict[str, str]:
    """What the grammar may say of a schema without leaving anything out.

    A text that begins with the wrong kind of value could never end, and every token that closes it
    would be judged in vain. Numbers are left out: grammars and schemas differ about 1.0.
    """
    kind = schema.get("type") if isinstance(schema, dict) else None
    # Before draft 2019-09 a reference stands alone, and what is beside it says nothing.
    alone = isinstance(schema, dict) and "$ref" in schema
    return {"type": kind} if kind in ("object", "array", "string") and not alone else {}


def _check_patterns(schema: Any) -> None:
    """Refuse what would run regular expressions outside the time limit, or not at all."""
    if isinstance(schema, list):
        for item in schema:
            _check_patterns(item)
    if not isinstance(schema, dict):
        return
    patterns = [schema.get("pattern"), *_names(schema.get("patternProperties"))]
    for pattern in patterns:
        if isinstance(pattern, str):
            try:
                regex.compile(pattern)
            except (regex.error, RecursionError, OverflowError) as error:
                raise ConstraintError(f"json_validate: pattern {pattern!r}: {error}") from error
    if _mentions(schema, "unevaluatedProperties") and _mentions(schema, "patternProperties"):
        raise ConstraintError(
            "json_validate: unevaluatedProperties together with patternProperties is not "
            "supported; use additionalProperties, or name the properties"
        )
    for value in schema.values():
        _check_patterns(value)


def _names(value: Any) -> list[str]:
    return list(value) if isinstance(value, dict) else []


def _mentions(schema: Any, keyword: str) -> bool:
    if isinstance(schema, dict):
        return keyword in schema or any(_mentions(value, keyword) for value in schema.values())
    return isinstance(schema, list) and any(_mentions(item, keyword) for item in schema)
