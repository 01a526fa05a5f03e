# SPDX-License-Identifier: Apache-2.0
"""Sampling presets of ``vllm-ext verify``: one per feature that speculation must not change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Kwargs = dict[str, Any]

_PERSON_SCHEMA: Kwargs = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
_SAMPLED: Kwargs = {"temperature": 0.8, "top_p": 0.95}


@dataclass(frozen=True)
class Preset:
    """One way of sampling; `seeded` gives every prompt a seed of its own."""

    kwargs: Kwargs
    seeded: bool = False

    def params(self, index: int, max_tokens: int) -> Kwargs:
        """Arguments of `vllm.SamplingParams` for the prompt with this index."""
        params = {"max_tokens": max_tokens, **self.kwargs}
        if self.seeded:
            params["seed"] = 1 + index
        if "min_tokens" in params:
            params["min_tokens"] = min(params["min_tokens"], max_tokens)
        return params


# Token ids in here are small numbers, so that they exist in every vocabulary.
PRESETS: Mapping[str, Preset] = {
    "greedy": Preset({"temperature": 0.0}),
    "seeded": Preset(_SAMPLED, seeded=True),
    "top_k": Preset({"temperature": 1.0, "top_k": 20}, seeded=True),
    "min_p": Preset({"temperature": 1.0, "min_p": 0.05}, seeded=True),
    "penalties": Preset(
        {
            "temperature": 0.0,
            "repetition_penalty": 1.2,
            "presence_penalty": 0.4,
            "frequency_penalty": 0.3,
        }
    ),
    "seeded_penalties": Preset(
        {**_SAMPLED, "repetition_penalty": 1.1, "presence_penalty": 0.2}, seeded=True
    ),
    "logit_bias": Preset({"temperature": 0.0, "logit_bias": {198: -4.0, 260: 2.0, 282: -100.0}}),
    "bad_words": Preset({"temperature": 0.0, "bad_words": ["the", "is", "and the", "of the"]}),
    "allowed_token_ids": Preset({"temperature": 0.0, "allowed_token_ids": list(range(2000))}),
    "min_tokens": Preset({"temperature": 0.0, "min_tokens": 96}),
    "stop": Preset({"temperature": 0.0, "stop": [". ", "\n\n"], "stop_token_ids": [42, 198]}),
    "logprobs": Preset({"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 1}),
    "n2": Preset({**_SAMPLED, "n": 2}, seeded=True),
    "ignore_eos": Preset({"temperature": 0.0, "ignore_eos": True}),
    "structured": Preset({"temperature": 0.0, "structured_outputs": {"json": _PERSON_SCHEMA}}),
}


class PresetError(ValueError):
    """A preset name is unknown or repeated; the message lists those there are."""


def parse_presets(names: str) -> dict[str, Preset]:
    """Presets from a comma-separated list of names; "all" stands for every preset.

    Raises:
        PresetError: A name is unknown or repeated, or the list is empty.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if wanted == ["all"]:
        return dict(PRESETS)
    if not wanted or len(set(wanted)) != len(wanted) or not set(wanted) <= set(PRESETS):
        raise PresetError(
            f"sampling {names!r}: give 'all' or different names out of {', '.join(PRESETS)}"
        )
    return {name: PRESETS[name] for name in wanted}


def describe_presets() -> list[str]:
    """One line per preset: its name and arguments."""
    lines = []
    for name, preset in PRESETS.items():
        text = ", ".join(f"{key}={_shown(value)}" for key, value in preset.kwargs.items())
        lines.append(f"{name}: {text}" + (", a seed per prompt" if preset.seeded else ""))
    return lines


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
