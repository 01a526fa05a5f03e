# SPDX-License-Identifier: Apache-2.0
"""Arms of a comparison: a name, and the engine that it stands for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_ext.cli.engine_types import EngineConfig

NONE = "none"
WITH_MODEL = "+model"
# vLLM's own n-gram drafter needs its window and length spelled out.
DEFAULT_CONFIGS: Mapping[str, dict[str, Any]] = {
    "ngram": {
        "method": "ngram",
        "num_speculative_tokens": 5,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 4,
    },
    "draft_model": {"method": "draft_model", "num_speculative_tokens": 3},
}
_NEED_MODEL = frozenset({"draft_model", "pearl"})


class ArmError(ValueError):
    """An arm is malformed; the message says what was given and what is allowed."""


@dataclass(frozen=True)
class Arm:
    """One side of a comparison; `speculative_config` is None for plain vLLM."""

    name: str
    speculative_config: dict[str, Any] | None

    def engine_config(self, llm: Mapping[str, Any], env: Mapping[str, str]) -> EngineConfig:
        """The engine of this arm, given what all arms share.

        vLLM's own methods run with this plugin switched off, so that they are vLLM as it ships.
        """
        config = self.speculative_config
        return EngineConfig(
            dict(llm) if config is None else {**llm, "speculative_config": config},
            dict(env) if self.is_ours else {**env, "VLLM_EXT_DISABLE": "1"},
        )

    @property
    def is_ours(self) -> bool:
        """Whether its method is one of this package."""
        config = self.speculative_config
        return config is not None and config["method"] in our_methods()


def our_methods() -> frozenset[str]:
    """Names of the methods that this plugin adds to vLLM."""
    from vllm_ext.methods import METHODS

    return frozenset(METHODS)


def parse_arms(names: str, overrides: Iterable[str] = (), draft: str | None = None) -> list[Arm]:
    """Arms from a comma-separated list of names and NAME=JSON overrides.

    A name is "none", a method of vLLM or of this package, such a method with "+model" behind it
    (it drafts with the model `draft`), or any name that an override defines; an override's JSON
    object is merged over the defaults of the method it names (by default the method of the arm's
    own name).

    Raises:
        ArmError: Empty or repeated names, an override that is not a JSON object or fits no arm, or
            an arm that needs a draft model where none is given.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted or len(set(wanted)) != len(wanted):
        raise ArmError(f"arms {names!r}: give one or more different names, separated by commas")
    configs = dict(_parse_override(text) for text in overrides)
    unused = sorted(set(configs) - set(wanted))
    if unused:
        raise ArmError(f"arm configuration for {unused}, but the arms are {wanted}")
    if NONE in configs:
        raise ArmError("arm 'none' is vLLM without speculation and takes no configuration")
    return [_make_arm(name, configs.get(name, {}), draft) for name in wanted]


def _make_arm(name: str, override: dict[str, Any], draft: str | None) -> Arm:
    if name == NONE:
        return Arm(NONE, None)
    method = override.get("method", name.removesuffix(WITH_MODEL))
    config = {"method": method, **DEFAULT_CONFIGS.get(method, {})}
    if (name.endswith(WITH_MODEL) or method in _NEED_MODEL) and "model" not in override:
        if draft is None:
            raise ArmError(f"arm {name!r} needs a draft model: give --draft MODEL")
        config["model"] = draft
    return Arm(name, {**config, **override})


def _parse_override(text: str) -> tuple[str, dict[str, Any]]:
    name, separator, body = text.partition("=")
    try:
        config = json.loads(body)
    except json.JSONDecodeError as error:
        raise ArmError(f"arm configuration {text!r}: not NAME=JSON ({error})") from error
    if not separator or not name or not isinstance(config, dict):
        raise ArmError(
            f"arm configuration {text!r}: give NAME={{...}}, for example "
            """'small={"method": "dyspec", "num_speculative_tokens": 8}'"""
        )
    return name, config
