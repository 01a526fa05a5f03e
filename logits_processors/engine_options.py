# SPDX-License-Identifier: Apache-2.0
"""What an operator may set when an engine starts: one dictionary in vLLM's ``additional_config``.

The models of :mod:`logits_processors.limits` validate it; the error messages and the table in the
documentation come from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from .limits import OPTIONS_KEY, Bounds, Limits

_PREFIX = "vllm_ext_"
_KNOWN = (*Limits.model_fields, *Bounds.model_fields)


def read_options(additional_config: Any) -> tuple[Limits, Bounds]:
    """Read the bounds that an operator set.

    Args:
        additional_config: vLLM's; what is not a dictionary holds nothing of ours.

    Raises:
        ValueError: names the option, what was given and what is allowed.
    """
    config = additional_config if isinstance(additional_config, dict) else {}
    misspelt = [key for key in config if str(key).startswith(_PREFIX) and key != OPTIONS_KEY]
    if misspelt:  # a bound that silently does not hold is worse than none
        raise ValueError(f"additional_config[{misspelt[0]!r}] is unknown; known: {OPTIONS_KEY!r}")
    given = config.get(OPTIONS_KEY, {})
    name = f"additional_config[{OPTIONS_KEY!r}]"
    if not isinstance(given, dict):
        raise ValueError(f"{name} given as {given!r}; a dictionary is allowed")
    unknown = [option for option in given if option not in _KNOWN]
    if unknown:
        raise ValueError(
            f"{name}: unknown option {', '.join(map(repr, unknown))}; known: {', '.join(_KNOWN)}"
        )
    try:
        return Limits(**_of(Limits, given)), Bounds(**_of(Bounds, given))
    except ValidationError as error:
        raise ValueError(
            "; ".join(
                f"{name}[{problem['loc'][0]!r}] given as {problem['input']!r}: "
                f"{problem['msg'].lower()}"
                for problem in error.errors()
            )
        ) from None


def _of(model: type[Limits | Bounds], given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name in model.model_fields}


def table() -> Iterator[tuple[str, str, str, str]]:
    """Yield ``(option, type, default, description)`` of every option, for the documentation."""
    for model in (Limits, Bounds):
        for name, field in model.model_fields.items():
            kind = getattr(field.annotation, "__name__", "")
            yield name, kind, str(field.default), field.description or ""
