# SPDX-License-Identifier: Apache-2.0
"""How the suite runs: side by side on a core each, Triton's interpreter in a process of its own.

vLLM's CPU engine pins its threads, by default to the first cores of the machine: engines that
pytest-xdist starts side by side would share them.  So every worker gets a core.

``TRITON_INTERPRET`` counts when Triton is first imported, and would change what vLLM and torch find
in the same process.  So tests marked ``interpreter`` are skipped here, and
``tests/test_interpreter.py`` runs them in a second process.  Where there is a GPU it takes the
interpreter's place, and they run like all others.
"""

from __future__ import annotations

import os

import pytest
import torch


def pytest_configure() -> None:
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        core = cores[int(worker.removeprefix("gw")) % len(cores)]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(core))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="runs in Triton's interpreter, from tests/test_interpreter.py")
    for item in items:
        if item.get_closest_marker("interpreter"):
            item.add_marker(skip)
