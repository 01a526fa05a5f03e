# SPDX-License-Identifier: Apache-2.0
"""From ``{"method": "dyspec", ...}`` to a configuration that stock vLLM accepts.

vLLM's ``SpeculativeConfig`` takes a closed list of methods and no free-form options.  We ride on
its ``custom_class`` (which selects Model Runner V1 and synchronous scheduling), name our worker in
``worker_cls`` and carry the options in ``additional_config``: small, JSON, hashed by vLLM into the
key of its compile cache.  The translation is idempotent: vLLM may build a configuration twice from
one ``EngineArgs``.
"""

from __future__ import annotations

import os
from typing import Any

from vllm_ext import self_draft
from vllm_ext.build import check_resources
from vllm_ext.draft_config import check_draft
from vllm_ext.method_options import PearlConfig, SelfDraftConfig, TreeConfig
from vllm_ext.methods import METHODS, OptionError, parse_options

CONFIG_KEY = "vllm_ext"
"""Key of ``VllmConfig.additional_config`` under which the method and its options travel."""

PLACEHOLDER_CLASS = "vllm_ext.proposer.TreeProposer"
CPU_WORKER = "vllm_ext.worker.cpu.TreeCPUWorker"
GPU_WORKER = "vllm_ext.worker.gpu.TreeGPUWorker"


def translate(engine_args: Any, model_config: Any, parallel_config: Any) -> None:
    """Rewrite ``engine_args.speculative_config`` in place if it names one of our methods.

    Args:
        engine_args: vLLM's ``EngineArgs``.
        model_config: the target's ``ModelConfig``.
        parallel_config: the ``ParallelConfig``; gets ``worker_cls``.

    Raises:
        OptionError: bad options or an impossible combination, before any engine process starts.
    """
    config = _merged_config(engine_args)
    if config is None:
        return
    if config.get("model") == PLACEHOLDER_CLASS:  # second pass over the same EngineArgs
        if CONFIG_KEY not in (engine_args.additional_config or {}):
            raise OptionError(
                f"'{PLACEHOLDER_CLASS}' cannot be named as a custom_class by hand; use "
                '{"method": "dyspec"}'
            )
        parallel_config.worker_cls = _worker_class(parallel_config)
        return
    if not _is_named(config.get("method")):
        return
    method = METHODS[config["method"]]
    given = {k.replace("-", "_"): v for k, v in config.items() if k != "method"}
    options = parse_options(method, given)
    _refuse_impossible(engine_args, model_config, parallel_config)
    download_dir = getattr(engine_args, "download_dir", None)
    runs = method.name
    try:
        if isinstance(options, SelfDraftConfig):
            options = self_draft.as_dyspec(options, model_config, parallel_config, download_dir)
            runs = "dyspec"
        check_draft(options, model_config, parallel_config, download_dir)
        check_resources(options, model_config, download_dir)
    except ValueError as error:
        raise OptionError(f"speculative method '{method.name}': {error}") from error

    # Merged above; a second merge raises.
    engine_args.spec_method = engine_args.spec_tokens = engine_args.spec_model = None
    engine_args.speculative_config = {
        "method": "custom_class",
        "model": PLACEHOLDER_CLASS,
        "num_speculative_tokens": options.num_speculative_tokens,
    }
    engine_args.additional_config = {
        **(engine_args.additional_config or {}),
        CONFIG_KEY: {
            "method": runs,
            "options": options.model_dump(),
            **({"cores": _cores()} if isinstance(options, PearlConfig) else {}),
        },
    }
    parallel_config.worker_cls = _worker_class(parallel_config)


def read_options(vllm_config: Any) -> tuple[str, TreeConfig]:
    """Return the method's name and options from a finished ``VllmConfig`` (worker side)."""
    carried = vllm_config.additional_config[CONFIG_KEY]
    method = METHODS[carried["method"]]
    return method.name, parse_options(method, carried["options"])


def read_cores(vllm_config: Any) -> set[int]:
    """The cores that the engine's front end was allowed to use, where a method asks (worker)."""
    return set(vllm_config.additional_config[CONFIG_KEY].get("cores", ()))


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def draft_slots(vllm_config: Any) -> int:
    """KV slots that a draft model of ours writes beyond the tokens that are scheduled.

    The walk's own token, which becomes the root of the next tree, and the nodes of that tree.
    """
    if not is_ours(vllm_config.speculative_config):
        return 0
    options = vllm_config.additional_config[CONFIG_KEY]["options"]
    return 1 + int(options["num_speculative_tokens"]) if options.get("model") else 0


def is_ours(speculative_config: Any) -> bool:
    """Whether a finished ``SpeculativeConfig`` was made by :func:`translate`."""
    return speculative_config is not None and speculative_config.model == PLACEHOLDER_CLASS


def _merged_config(engine_args: Any) -> dict[str, Any] | None:
    """The speculative config with ``--spec-method`` and ``--spec-tokens`` merged in."""
    flags = {
        "method": engine_args.spec_method,
        "model": engine_args.spec_model,
        "num_speculative_tokens": engine_args.spec_tokens,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    config = engine_args.speculative_config
    if not config and not given:
        return None
    config = dict(config or {})
    if not _is_named(config.get("method", given.get("method"))):
        return config  # not ours: vLLM merges, and complains, itself
    for key, value in given.items():
        if key in config:
            flag = _FLAGS[key]
            raise OptionError(f"{flag} and --speculative-config['{key}'] are mutually exclusive")
        config[key] = value
    return config


def _is_named(method: Any) -> bool:
    """Whether a value given as method names one of ours; a list, say, names nothing."""
    return isinstance(method, str) and method in METHODS


_FLAGS = {
    "method": "--spec-method",
    "model": "--spec-model",
    "num_speculative_tokens": "--spec-tokens",
}


def _worker_class(parallel_config: Any) -> str:
    from vllm.platforms import current_platform

    ours = CPU_WORKER if current_platform.is_cpu() else GPU_WORKER
    if parallel_config.worker_cls not in ("auto", ours):
        raise OptionError(
            f"worker_cls is '{parallel_config.worker_cls}', but our speculative methods bring "
            f"their own ({ours}): remove --worker-cls"
        )
    return ours


def _refuse_impossible(engine_args: Any, model_config: Any, parallel_config: Any) -> None:
    """Refuse, before the engine starts, what cannot be exact."""
    from vllm.platforms import current_platform

    problems: list[str] = []
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "").lower() in ("1", "true"):
        problems.append(
            "VLLM_USE_V2_MODEL_RUNNER forces Model Runner V2, our methods run on V1: unset it or "
            "set it to 0"
        )
    if parallel_config.pipeline_parallel_size > 1:
        problems.append(
            f"pipeline_parallel_size is {parallel_config.pipeline_parallel_size}: trees are known "
            "on the last stage only; use 1 (tensor parallelism works)"
        )
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel_config, name, 1) > 1:
            problems.append(f"{name} is {getattr(parallel_config, name)}: use 1")
    if getattr(engine_args, "async_scheduling", None):
        problems.append(
            "async_scheduling is on: the next draft needs the tokens of this step; remove "
            "--async-scheduling"
        )
    if os.environ.get("VLLM_COMPUTE_NANS_IN_LOGITS", "0") not in ("", "0"):
        problems.append(
            "VLLM_COMPUTE_NANS_IN_LOGITS counts rows of logits by request, which speculation "
            "breaks: unset it"
        )
    if model_config.runner_type != "generate":
        problems.append(f"runner '{model_config.runner_type}' generates no tokens: use 'generate'")
    if model_config.is_encoder_decoder:
        problems.append("encoder-decoder models are not supported")
    if model_config.is_hybrid or model_config.is_attention_free:
        problems.append(
            "the model has recurrent layers, whose state cannot branch: speculation with it would "
            "not be exact"
        )
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        problems.append(f"platform '{current_platform.device_name}' is neither CPU nor CUDA")
    if problems:
        raise OptionError("our speculative methods cannot run here: " + "; ".join(problems))
