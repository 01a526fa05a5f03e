# SPDX-License-Identifier: Apache-2.0
"""The speculative methods that this package adds, and their options.

Each option is a typed field with a default, a range and a one-line description: validation, the
table of ``vllm-ext methods`` and ``docs/methods.md`` are all generated from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class OptionError(ValueError):
    """A speculative option is unknown, of the wrong type or out of range."""


class DySpecConfig(BaseModel):
    """Options of ``{"method": "dyspec"}``."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    num_speculative_tokens: int = Field(
        default=24, ge=1, le=127, description="most tree nodes per request and step"
    )
    max_depth: int = Field(default=12, ge=1, le=64, description="longest path of a tree, in tokens")
    min_probability: float = Field(
        default=0.02,
        ge=0.0,
        lt=1.0,
        description="nodes whose path is less likely than this are never drafted",
    )
    prompt_rows: int = Field(
        default=0,
        ge=0,
        le=4096,
        description="last prompt positions whose next-token candidates are learnt at prefill "
        "(each costs one row of the output layer, once)",
    )
    adaptive: bool = Field(
        default=True,
        description="size trees by the measured latency of a step; false drafts "
        "num_speculative_tokens nodes whenever it has them",
    )


@dataclass(frozen=True, slots=True)
class Method:
    """A named way of drafting.

    Attributes:
        name: the value of ``method`` in the speculative config.
        summary: one line.
        paper: title and arXiv id of what it implements.
        options: pydantic model of its options.
    """

    name: str
    summary: str
    paper: str
    options: type[DySpecConfig]


METHODS: dict[str, Method] = {
    "dyspec": Method(
        name="dyspec",
        summary="dynamic token tree from recycled target candidates and text already seen, "
        "grown best first and sized by the measured cost of a step; needs no draft model",
        paper="DySpec (arXiv 2410.11744), Token Recycling (arXiv 2408.08696)",
        options=DySpecConfig,
    ),
}


def describe_options(method: Method) -> str:
    """Return ``name (type, default)`` of every option, comma separated."""
    fields = method.options.model_fields.items()
    return ", ".join(f"{name} (default {field.default})" for name, field in fields)


def parse_options(method: Method, given: dict[str, Any]) -> DySpecConfig:
    """Validate the options of a speculative config.

    Args:
        method: the method that was asked for.
        given: the config without its ``method`` key.

    Raises:
        OptionError: names each bad option, what was given and what is allowed.
    """
    try:
        return method.options.model_validate(given)
    except ValidationError as error:
        problems = [_explain(method, problem) for problem in error.errors()]
        raise OptionError(
            f"speculative method '{method.name}': {'; '.join(problems)}. "
            f"Options: {describe_options(method)}."
        ) from None


def _explain(method: Method, problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown option '{name}' (given {problem['input']!r})"
    return f"option '{name}' given as {problem['input']!r}: {problem['msg'].lower()}"
