# SPDX-License-Identifier: Apache-2.0
"""Constraints written in Python: a prefix check and a completion check, found by name.

A predicate is code, so it comes from packages installed beside the engine and never from a request:
a request names it and may pass it an argument, which is data. Packages offer predicates through the
entry-point group ``vllm_ext.predicates``; each entry resolves to a :data:`PredicateFactory`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Protocol, TypeAlias

from .constraint import ConstraintError, ConstraintRuntimeError, constraint_key
from .limits import DEFAULT_LIMITS, Limits, limit_named
from .text_constraint import CompiledTextConstraint
from .vocabulary import Vocabulary

ENTRY_POINT_GROUP = "vllm_ext.predicates"


class Predicate(Protocol):
    """A language of texts. Both checks must be deterministic and must not keep state."""

    def prefix(self, text: str) -> bool:
        """Tell whether ``text`` may become valid; must hold for each prefix of a valid text."""

    def complete(self, text: str) -> bool:
        """Tell whether ``text`` is valid as it stands."""


PredicateFactory: TypeAlias = Callable[[str], Predicate]
"""Builds a predicate from the request's argument (``""`` when it gives none); raises ``ValueError``
for an argument that it cannot use."""


def _find(name: str) -> PredicateFactory:
    found = entry_points(group=ENTRY_POINT_GROUP)
    matches = found.select(name=name)
    if len(matches) != 1:
        known = ", ".join(sorted({entry.name for entry in found})) or "none"
        problem = "is not registered" if not matches else "is registered more than once"
        raise ConstraintError(
            f"predicate {name!r} {problem}; registered: {known}. Install a package that offers it "
            f"through the entry-point group {ENTRY_POINT_GROUP!r}."
        )
    factory: PredicateFactory = next(iter(matches)).load()
    return factory


@dataclass(frozen=True)
class _PredicateLanguage:
    name: str
    predicate: Predicate

    def viable(self, text: str) -> bool:
        return self._ask(self.predicate.prefix, text)

    def member(self, text: str) -> bool:
        return self._ask(self.predicate.complete, text)

    def _ask(self, check: Callable[[str], bool], text: str) -> bool:
        try:
            return bool(check(text))
        except Exception as error:
            raise ConstraintRuntimeError(
                f"predicate {self.name!r} raised {type(error).__name__}: {error}"
            ) from error


def compile_predicate(
    name: str,
    vocabulary: Vocabulary,
    argument: str = "",
    limits: Limits = DEFAULT_LIMITS,
    factory: PredicateFactory | None = None,
) -> CompiledTextConstraint:
    """Bind a predicate to a vocabulary.

    Args:
        name: name of the entry point.
        vocabulary: the model's vocabulary.
        argument: text that the factory receives; bounded by ``limits.max_bytes``.
        limits: bounds on the request.
        factory: the factory itself, for callers that hold it; else the entry point is looked up.

    Raises:
        ConstraintError: unknown name, an argument that the factory refuses, or an empty language.
    """
    if len(argument.encode("utf-8", "surrogatepass")) > limits.max_bytes:
        raise ConstraintError(
            f"predicate {name!r}: the argument exceeds {limits.max_bytes} bytes "
            f"({limit_named('max_bytes')})"
        )
    build = factory or _find(name)
    try:
        predicate = build(argument)
    except Exception as error:  # a request must not get further than this on a bug in a factory
        raise ConstraintError(
            f"predicate {name!r} refuses its argument: {type(error).__name__}: {error}"
        ) from error
    key = constraint_key(vocabulary, "predicate", name, argument)
    return CompiledTextConstraint(
        _PredicateLanguage(name, predicate), vocabulary, key, f"predicate {name!r}"
    )
