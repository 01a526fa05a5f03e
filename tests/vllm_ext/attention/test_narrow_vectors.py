# SPDX-License-Identifier: Apache-2.0
"""The kernels for vector units as a processor without AVX-512 has them compiled.

Their matrix product has another shape there. Numba compiles for another processor only in a process
of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from llvmlite import binding

HERE = Path(__file__).parent
TESTS = (
    HERE / "test_cpu_kernel.py",
    HERE.parent / "test_gemm.py",
    HERE.parent / "test_compiled.py",
)


@pytest.mark.skipif(
    not binding.get_host_cpu_features().get("avx512f"),
    reason="the other tests are compiled without AVX-512 already",
)
def test_kernels_without_avx512(tmp_path: Path) -> None:
    features = binding.get_host_cpu_features()
    features.update(
        {name: False for name in features if name.startswith(("avx512", "avx10", "amx"))}
    )
    shape = "from vllm_ext.gemm import COLUMNS; assert COLUMNS == 16"
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": features.flatten(),
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    subprocess.run([sys.executable, "-c", shape], cwd=HERE.parents[2], env=environment, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, TESTS)],
        cwd=HERE.parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 50  # not an empty selection
