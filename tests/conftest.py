# SPDX-License-Identifier: Apache-2.0
"""Tests of Triton kernels run in Triton's interpreter, in a process of its own.

``TRITON_INTERPRET`` counts when Triton is first imported, and would change what vLLM and torch find
in the same process.  So tests marked ``interpreter`` are skipped here, and
``tests/test_interpreter.py`` runs them in a second process.  Where there is a GPU it takes the
interpreter's place, and they run like all others.
"""

from __future__ import annotations

import os

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="runs in Triton's interpreter, from tests/test_interpreter.py")
    for item in items:
        if item.get_closest_marker("interpreter"):
            item.add_marker(skip)
