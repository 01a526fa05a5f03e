# SPDX-License-Identifier: Apache-2.0
"""Runs the tests marked ``interpreter`` under Triton's interpreter, in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
MARKER = "pytest.mark.interpreter"


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available(),
    reason="the marked tests run in this process",
)
def test_kernels_in_the_interpreter() -> None:
    files = [p for p in ROOT.glob("tests/**/test_*.py") if MARKER in p.read_text()]
    files.remove(Path(__file__))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "interpreter and not slow", *files]
    done = subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    summary = done.stdout.strip().splitlines()[-1:]
    print(*summary)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    passed = re.search(r"(\d+) passed", "".join(summary))
    assert passed is not None
    assert int(passed[1]) >= 20  # not an empty selection
    assert "skipped" not in "".join(summary)
