# SPDX-License-Identifier: Apache-2.0
"""Tests of tree attention by matrix tiles, in a process of their own where the tiles are emulated.

So the kernel is tested on every machine; that the instructions do what the emulator says is tested
where the processor has them (`test_amx_kernel`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_the_kernel_with_emulated_tiles() -> None:
    tests = [str(HERE / "test_amx_kernel.py"), "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm_ext.attention.amx_emulator", *tests],
        cwd=HERE.parents[2],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 50  # not an empty selection
