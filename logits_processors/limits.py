# SPDX-License-Identifier: Apache-2.0
"""Bounds on the constraints that a request may bring.

A grammar is a program from a stranger. These bounds are checked on its text before any engine reads
it, so that a refusal costs microseconds; what text alone cannot bound (time and memory of the
compilation) is the business of :mod:`logits_processors.vetting`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .constraint import ConstraintError

STARVED = 4.0
"""Seconds on the wall per second of processor time after which a compilation counts as hanging."""

_OPENING, _CLOSING = frozenset("([{"), frozenset(")]}")


@dataclass(frozen=True)
class Limits:
    """What a constraint may cost.

    Attributes:
        max_bytes: length of its source in UTF-8.
        max_depth: nesting of brackets in its source.
        compile_seconds: processor time of its compilation, in the vetting process.
        compile_memory_mb: memory that its compilation may add, in the vetting process.
        check_seconds: time of one step of the constraint while generating.
    """

    max_bytes: int = 1_000_000
    max_depth: int = 200
    compile_seconds: float = 10.0
    compile_memory_mb: int = 2048
    check_seconds: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"limit {name}={value} must be positive")


DEFAULT_LIMITS = Limits()


def check_source(source: str, kind: str, limits: Limits) -> None:
    """Refuse a constraint by its size or nesting.

    Brackets inside string literals count too: the languages quote differently, and the bound is far
    above what honest sources nest.

    Raises:
        ConstraintError: the source is empty, too long or too deep.
    """
    if not source.strip():
        raise ConstraintError(f"{kind}: the source is empty; give a constraint or leave it out")
    size = len(source.encode("utf-8", "surrogatepass"))
    if size > limits.max_bytes:
        raise ConstraintError(
            f"{kind}: {size} bytes given, at most {limits.max_bytes} allowed (limit max_bytes)"
        )
    depth = 0
    for char in source:
        if char in _OPENING:
            depth += 1
            if depth > limits.max_depth:
                raise ConstraintError(
                    f"{kind}: brackets nest deeper than {limits.max_depth} levels (limit "
                    "max_depth); name inner parts as rules or definitions"
                )
        elif char in _CLOSING:
            depth = max(0, depth - 1)
