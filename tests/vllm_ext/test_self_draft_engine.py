# SPDX-License-Identifier: Apache-2.0
"""A target that drafts with some of its own layers, on the whole engine.

The control: where the layers left out do nothing, the others say what the target says, and every
greedy walk ends at a leaf of its tree. Leave out a layer that does something, and it must show.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.vllm_ext.engine import make_engine, make_tiny_model, prompts, texts
from tests.vllm_ext.test_draft_engine import GREEDY, LARGE, SEEDED, shut, watched
from tests.vllm_ext.test_engine import params

pytestmark = pytest.mark.engine

IDLE = (1, 3)  # of four layers


@pytest.fixture(scope="module", autouse=True)
def draft_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    cache = tmp_path_factory.mktemp("cache")
    patch.setattr("vllm_ext.self_draft.cache_folder", lambda: cache)
    patch.setattr("vllm_ext.config.CPU_WORKER", "tests.vllm_ext.draft_worker.DraftWorker")
    yield
    patch.undo()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with layers that add nothing to what they get."""
    folder = make_tiny_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4)
    tensors = load_file(folder / "model.safetensors")
    for layer in IDLE:
        for output in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{layer}.{output}.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_layers_that_draft(model: Path) -> None:
    requests = prompts(4, seed=3)
    engine = make_engine(model, None, max_num_batched_tokens=1024)
    try:
        expected = [texts(engine, requests, params(**case)) for case in (GREEDY, SEEDED)]
    finally:
        shut(engine)
    own = {**LARGE, "method": "self_draft", "sources": []}
    inside = []
    for layers in ([0, 2], [0, 3]):
        engine = make_engine(model, {**own, "layers": layers})
        try:
            made, counts = watched(engine, requests, GREEDY)
            seeded, _ = watched(engine, requests, SEEDED)
            state = engine.collective_rpc("draft_state")[0]
        finally:
            shut(engine)
        assert [made, seeded] == expected
        assert state["used"]
        assert counts["trees"] > 5
        assert counts["branching"] > counts["trees"] / 2
        inside.append(counts["inside"] / counts["trees"])
    with_all_that_matter, without_one = inside
    assert with_all_that_matter == 0
    assert without_one > 0.2
