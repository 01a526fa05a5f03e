# SPDX-License-Identifier: Apache-2.0
"""What several modules of engine tests share, because it takes long to start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm_ext import predicates
from tests.vllm_ext.engine import make_tiny_model
from tests.vllm_ext.server import MAX_LEN, Server, running_server


@pytest.fixture(scope="session")
def installed_predicates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Predicates that this process and the engines it starts find installed."""
    patch = pytest.MonkeyPatch()
    predicates.install(tmp_path_factory.mktemp("installed"), patch)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def served_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a long context."""
    return make_tiny_model(tmp_path_factory.mktemp("served"), MAX_LEN)


@pytest.fixture(scope="session")
def server(
    served_model: Path, tmp_path_factory: pytest.TempPathFactory, installed_predicates: None
) -> Iterator[Server]:
    """One server for all."""
    with running_server(served_model, tmp_path_factory.mktemp("log")) as started:
        yield started
