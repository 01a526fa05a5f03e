# SPDX-License-Identifier: Apache-2.0
"""From a request's words (a kind and a source) to a compiled constraint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from .constraint import CompiledConstraint, ConstraintError
from .json_validate import compile_json_validate
from .limits import DEFAULT_LIMITS, Limits
from .llguidance_constraint import compile_lark
from .predicate import compile_predicate
from .regex_constraint import compile_regex
from .vocabulary import Vocabulary
from .xgrammar_constraint import compile_xgrammar

Kind: TypeAlias = Literal[
    "json_schema",
    "json_validate",
    "ebnf",
    "lark",
    "regex",
    "regex_partial",
    "structural_tag",
    "predicate",
]


@dataclass(frozen=True)
class Spec:
    """A constraint as a request states it.

    Attributes:
        kind: which language ``source`` is in. ``regex`` is compiled to masks, ``regex_partial``
            also knows look-around and back-references; ``json_schema`` is compiled to masks,
            ``json_validate`` is checked by a validator.
        source: the schema, grammar, expression or tag; for ``predicate`` its registered name.
        argument: what a predicate's factory receives; empty for all other kinds.
    """

    kind: Kind
    source: str
    argument: str = ""


def compile_constraint(
    spec: Spec, vocabulary: Vocabulary, limits: Limits = DEFAULT_LIMITS
) -> CompiledConstraint:
    """Compile ``spec`` for ``vocabulary``.

    Raises:
        ConstraintError: an unknown kind, or what the engine of that kind refuses.
    """
    if spec.argument and spec.kind != "predicate":
        raise ConstraintError(f"{spec.kind}: an argument was given; only predicates take one")
    if spec.kind == "predicate":
        return compile_predicate(spec.source, vocabulary, spec.argument, limits)
    if spec.kind == "lark":
        return compile_lark(spec.source, vocabulary, limits)
    if spec.kind == "regex_partial":
        return compile_regex(spec.source, vocabulary, limits)
    if spec.kind == "json_validate":
        return compile_json_validate(spec.source, vocabulary, limits)
    if spec.kind not in get_args(Kind):
        raise ConstraintError(
            f"constraint kind {spec.kind!r} is unknown; known: {', '.join(get_args(Kind))}"
        )
    return compile_xgrammar(spec.kind, spec.source, vocabulary, limits)
