# SPDX-License-Identifier: Apache-2.0
"""A tiny target, and one that is larger in no way but in layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm_ext.engine import make_tiny_model
from vllm_ext.distill.student import load_target


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def target(target_folder: Path) -> Any:
    return load_target(target_folder, torch.device("cpu"))
