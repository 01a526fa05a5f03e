# SPDX-License-Identifier: Apache-2.0
"""Install what vLLM's own methods need to be measured as peers, and nothing else.

`suffix` needs arctic-inference, which comes as source and asks for another torch, only to build.
So its build tools go into a folder that is removed again, and torch is the one that is there.
Standard library only, like ci/install.py.

Usage: python ci/peers.py [--target FOLDER]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

REQUIREMENT = "arctic-inference==0.1.1"  # the version that vLLM 0.31 and 0.32 name
MODULE = "arctic_inference"
BUILD_TOOLS = ("cmake>=3.12", "grpcio-tools", "nanobind==2.9.2", "ninja", "setuptools", "wheel")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install")


def main() -> None:
    """Build and install it; any failing step ends the program with its error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", help="install into this folder, not into the environment")
    target = parser.parse_args().target
    if target is None and find_spec(MODULE):
        print(f"==> {REQUIREMENT}: there already")
        return
    if find_spec("torch") is None:
        sys.exit("error: the engine is not installed: run `make install` first")
    if not (shutil.which("c++") or shutil.which("g++")):
        sys.exit("error: a C++ compiler is needed, for example the package g++ or gcc-c++")
    print(f"==> {REQUIREMENT}: compiled here, about 3 minutes", flush=True)
    with tempfile.TemporaryDirectory(prefix="vllm-ext-peers-") as tools:
        run(*PIP, "--quiet", "--target", tools, *BUILD_TOOLS)
        place = ["--target", target] if target else []
        run(
            *PIP,
            *("--no-deps", "--no-build-isolation", *place, REQUIREMENT),
            PYTHONPATH=tools,
            PATH=f"{Path(tools) / 'bin'}{os.pathsep}{os.environ['PATH']}",
        )


def run(*command: str, **environment: str) -> None:
    """Run a command with `environment` added, and end the program if it fails."""
    if subprocess.run(command, env={**os.environ, **environment}).returncode != 0:
        sys.exit(f"error: {' '.join(command[1:])} failed")


if __name__ == "__main__":
    main()
