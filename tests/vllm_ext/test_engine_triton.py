# SPDX-License-Identifier: Apache-2.0
"""The CUDA path in a whole engine, without a GPU: Triton's interpreter stands in for the card."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm_ext.engine import make_engine, make_tiny_model, prompts, texts

pytestmark = pytest.mark.engine
pytest.importorskip("triton")

SPECULATIVE = {"method": "dyspec", "num_speculative_tokens": 8, "adaptive": False}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """An engine without us, and its model."""
    model = make_tiny_model(tmp_path_factory.mktemp("model"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        engine = make_engine(model, None)
    yield engine, model
    engine.llm_engine.engine_core.shutdown()


def make_ours(folder: Path, worker: str, **options: Any) -> Any:
    """An engine for the model in a folder, with a worker of `triton_worker`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setattr("vllm_ext.config.CPU_WORKER", f"tests.vllm_ext.triton_worker.{worker}")
        patch.setenv("TRITON_INTERPRET", "1")  # reaches the worker, which is a new process
        return make_engine(folder, {**SPECULATIVE, **options})


@pytest.mark.parametrize(
    ("worker", "breaks"),
    [
        ("TritonWorker", ("leave_nodes_where_they_are", "hide_ancestors")),
        ("FlashWorker", ("shorten_contexts",)),
    ],
)
def test_same_tokens_through_the_triton_kernel(
    plain: tuple[Any, Path], worker: str, breaks: tuple[str, ...]
) -> None:
    ours = make_ours(plain[1], worker)
    try:
        compare(plain[0], ours, worker, breaks)
    finally:
        ours.llm_engine.engine_core.shutdown()


def compare(plain: Any, ours: Any, worker: str, breaks: tuple[str, ...]) -> None:
    """The same text, and another one with anything broken."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True, detokenize=False)
    requests = prompts(3, seed=5, longest=20)
    expected = texts(plain, requests, greedy)
    for _ in range(2):  # the second time the drafter knows the text, and much is accepted
        assert texts(ours, requests, greedy) == expected
    state = ours.collective_rpc("state")[0]
    assert state["refused"] is None
    assert state["launches"] > 5
    assert state["branching_trees"] > 5
    assert state["accepted_tokens"] > 5
    assert state["moved"] > 5
    assert (state["flash_calls"] > 5) == (worker == "FlashWorker")
    # The controls: with nodes in the wrong slots, wrong masks or contexts, the text changes.
    for broken in breaks:
        ours.collective_rpc(broken)
        assert texts(ours, requests, greedy) != expected


@pytest.mark.parametrize("worker", ["TritonWorker", "FlashWorker"])
def test_a_draft_model_through_the_triton_kernel(tmp_path: Path, worker: str) -> None:
    """A target that drafts for itself is never wrong, here with whole trees in every level."""
    from vllm import SamplingParams

    model = make_tiny_model(tmp_path / "model")
    engine = make_ours(model, worker, model=str(model), sources=[], min_probability=0.0)
    try:
        before = engine.collective_rpc("state")[0]
        greedy = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False)
        texts(engine, prompts(2, seed=5, longest=20), greedy)
        after = engine.collective_rpc("state")[0]
        change = {name: after[name] - before[name] for name in after if name != "refused"}
        assert after["refused"] is None
        assert change["drafting_errors"] == 0
        assert change["branching_trees"] > 5
        # Two prompts of one token each from prefill; every level of a tree holds the right token.
        assert change["accepted_tokens"] >= change["request_steps"] - 2
    finally:
        engine.llm_engine.engine_core.shutdown()
