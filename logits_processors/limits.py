# SPDX-License-Identifier: Apache-2.0
"""Bounds on the constraints that a request may bring, and on what an engine keeps of them.

A grammar is a program from a stranger. These bounds are checked on its text before any engine reads
it, so that a refusal costs microseconds; what text alone cannot bound (time and memory of the
compilation) is the business of :mod:`logits_processors.vetting`. An operator sets them through
:mod:`logits_processors.engine_options`.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from .constraint import ConstraintError

OPTIONS_KEY = "vllm_ext_constraints"
"""Key of these bounds in vLLM's ``additional_config``."""

STARVED = 4.0
"""Seconds on the wall per second of processor time after which a compilation counts as hanging."""

_OPENING, _CLOSING = frozenset("([{"), frozenset(")]}")
_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Limits(BaseModel):
    """What a constraint may cost."""

    model_config = _STRICT

    max_bytes: int = Field(
        default=1_000_000,
        gt=0,
        description="length of a constraint's source, and of a predicate's argument, in UTF-8",
    )
    max_depth: int = Field(
        default=200, gt=0, description="how deep brackets may nest in a constraint's source"
    )
    compile_seconds: float = Field(
        default=10.0,
        gt=0,
        description="processor time of a compilation, in the process that vets constraints",
    )
    compile_memory_mb: int = Field(
        default=2048, gt=0, description="memory that a compilation may add there, in MiB"
    )
    check_seconds: float = Field(
        default=1.0,
        gt=0,
        description="time of one question to a constraint while a text is generated",
    )


class Bounds(BaseModel):
    """What the store of one engine may hold; the oldest go first."""

    model_config = _STRICT

    records: int = Field(
        default=4096, gt=0, description="results of finished requests that nobody asked for yet"
    )
    parked: int = Field(
        default=256, gt=0, description="requests out of the batch that may come back (preemption)"
    )
    compiled: int = Field(default=256, gt=0, description="compiled constraints")
    trie_nodes: int = Field(
        default=1_000_000, gt=0, description="prefixes that ASAp and CARS have learnt, in all"
    )


DEFAULT_LIMITS = Limits()


def limit_named(*names: str) -> str:
    """Return what a refusal says about the limits behind it: their names, and who raises them how.

    Args:
        names: fields of :class:`Limits`.
    """
    options = ", ".join(f'"{name}": N' for name in names)
    return (
        f"limit{'s' if len(names) > 1 else ''} {', '.join(names)}; the engine's operator sets "
        f"{'them' if len(names) > 1 else 'it'} by --additional-config "
        f"'{{\"{OPTIONS_KEY}\": {{{options}}}}}'"
    )


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
            f"{kind}: {size} bytes given, at most {limits.max_bytes} allowed "
            f"({limit_named('max_bytes')})"
        )
    depth = 0
    for char in source:
        if char in _OPENING:
            depth += 1
            if depth > limits.max_depth:
                raise ConstraintError(
                    f"{kind}: brackets nest deeper than {limits.max_depth} levels; name inner "
                    f"parts as rules or definitions ({limit_named('max_depth')})"
                )
        elif char in _CLOSING:
            depth = max(0, depth - 1)
