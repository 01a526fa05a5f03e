# SPDX-License-Identifier: Apache-2.0
"""PEARL on the whole engine: drafting beside the forward pass changes no token.

The control is the target as its own draft: in float32 it is never wrong about a greedy token, so
what was drafted beside a step is always confirmed, and no walk ends before a leaf.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm_ext.engine import make_engine, make_tiny_model, prompts, texts
from tests.vllm_ext.test_draft_engine import GREEDY, SEEDED, long_prompts, shut, watched
from tests.vllm_ext.test_engine import params

pytestmark = pytest.mark.engine

OPTIONS: dict[str, Any] = {
    "method": "pearl",
    "num_speculative_tokens": 10,
    "adaptive": False,
    "min_probability": 0.0,
    "max_depth": 5,
}


@pytest.fixture(scope="module", autouse=True)
def pearl_worker() -> Iterator[None]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    patch = pytest.MonkeyPatch()
    patch.setattr("vllm_ext.config.CPU_WORKER", "tests.vllm_ext.pearl_worker.PearlWorker")
    yield
    patch.undo()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plain(model: Path) -> Iterator[Any]:
    engine = make_engine(model, None, max_num_batched_tokens=1024)
    yield engine
    shut(engine)


@pytest.fixture(scope="module")
def pearl(model: Path) -> Iterator[Any]:
    engine = make_engine(model, {**OPTIONS, "model": str(model)})
    yield engine
    shut(engine)


def counted(engine: Any, requests: list[Any], case: dict[str, Any]) -> tuple[Any, dict[str, float]]:
    before = engine.collective_rpc("draft_state")[0]
    made, counts = watched(engine, requests, case)
    after = engine.collective_rpc("draft_state")[0]
    named = ("steps", "passes", "requests", "hits")
    beside = {name: after[f"beside_{name}"] - before[f"beside_{name}"] for name in named}
    errors = after["drafting_errors"] - before["drafting_errors"]
    return made, {**counts, **beside, "errors": errors}


@pytest.mark.parametrize(
    "requests",
    [prompts(1, seed=2), prompts(4, seed=3), prompts(9, seed=4), long_prompts(4)],
    ids=["one", "four", "more-than-fit", "chunked"],
)
def test_its_own_draft_is_always_confirmed(plain: Any, pearl: Any, requests: Any) -> None:
    expected = texts(plain, requests, params(**GREEDY))
    pearl.reset_prefix_cache()
    for _ in range(2):  # the second time from cached prefixes
        made, counts = counted(pearl, requests, GREEDY)
        assert made == expected
        assert counts["errors"] == 0
        assert counts["inside"] <= 1  # kernels differ in rounding: a tie may fall either way
        assert counts["steps"] > 3
        assert counts["passes"] >= 2 * counts["steps"]
        # What is not confirmed is the last step of a text, which ends before its tree does.
        assert counts["requests"] - counts["hits"] <= len(requests) + 1


def test_seeded_text_is_the_same(plain: Any, pearl: Any) -> None:
    requests = prompts(6, seed=5)
    choice = {
        "structured_outputs": {"choice": ["alpha", "alpine", "beta"]},
        "detokenize": True,
    }
    for case in (SEEDED, {"temperature": 1.0, "seed": 4, "top_k": 5}, choice):
        made, counts = counted(pearl, requests, case)
        assert made == texts(plain, requests, params(**case))
        assert counts["errors"] == 0
        assert counts["steps"] > 0


def test_the_thread_has_its_own_core(pearl: Any) -> None:
    where = pearl.collective_rpc("where_drafted")[0]
    assert where["thread"] == [where["core"]]


def test_assuming_too_much_costs_acceptance_and_nothing_else(plain: Any, pearl: Any) -> None:
    """Negative control: keys of tokens that were not accepted must not be taken for the text's."""
    requests = prompts(6, seed=33)
    cases = [{"temperature": 0.7, "seed": seed, "ignore_eos": True} for seed in (7, 8, 9)]
    expected = [texts(plain, requests, params(**case)) for case in cases]
    accepted = {}
    for broken in ("none", "settle"):
        pearl.collective_rpc("break_pearl", args=(broken,))
        found = [counted(pearl, requests, case) for case in cases]
        assert [made for made, _ in found] == expected
        accepted[broken] = sum(counts["accepted"] for _, counts in found)
    pearl.collective_rpc("break_pearl", args=("none",))
    # How many tokens are accepted depends on how far the thread came beside each step, by a few.
    assert accepted["settle"] < 0.93 * accepted["none"], accepted


def test_a_pass_that_fails_beside_the_target_drops_the_draft(plain: Any, pearl: Any) -> None:
    """Goes last: the engine drafts without a model from here on."""
    requests = prompts(3, seed=44)
    pearl.collective_rpc("break_pearl", args=("pass",))
    made, counts = counted(pearl, requests, GREEDY)
    assert made == texts(plain, requests, params(**GREEDY))
    assert counts["errors"] == 1
    assert not pearl.collective_rpc("draft_state")[0]["used"]


def test_preempted_requests(plain: Any, model: Path) -> None:
    tight = make_engine(model, {**OPTIONS, "model": str(model)}, num_gpu_blocks_override=20)
    try:
        requests = prompts(6, seed=50, longest=90)
        case = {"max_tokens": 110, "ignore_eos": True}
        made, counts = counted(tight, requests, case)
        assert made == texts(plain, requests, params(**case))
        preemptions = [m.value for m in tight.get_metrics() if m.name == "vllm:num_preemptions"]
        assert sum(preemptions) > 0
        assert counts["inside"] <= 1  # kernels differ in rounding: a tie may fall either way
        assert counts["errors"] == 0
    finally:
        shut(tight)


def test_passes_as_a_gpu_makes_them(
    plain: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the target with attention metadata of vLLM's builders, in a context of their own."""
    worker = "tests.vllm_ext.pearl_worker.StreamWorker"
    monkeypatch.setattr("vllm_ext.config.CPU_WORKER", worker)
    engine = make_engine(model, {**OPTIONS, "model": str(model)})
    try:
        for requests in (prompts(4, seed=3), long_prompts(4)):
            made, counts = counted(engine, requests, GREEDY)
            assert made == texts(plain, requests, params(**GREEDY))
            assert counts["errors"] == 0
            assert counts["inside"] <= 1  # kernels differ in rounding: a tie may fall either way
            assert counts["steps"] > 3
            assert counts["requests"] - counts["hits"] <= len(requests) + 1
    finally:
        shut(engine)


def test_another_model_drafts(plain: Any, model: Path, tmp_path: Path) -> None:
    """Other weights, fewer layers, other heads, sized by cost, with other sources beside it."""
    draft = make_tiny_model(
        tmp_path / "draft", seed=7, num_hidden_layers=1, num_attention_heads=2, hidden_size=32
    )
    options = {"draft_dtype": "bfloat16", "sources": ["suffix", "bigram"], "max_model_len": 100}
    engine = make_engine(model, {"method": "pearl", "model": str(draft), **options})
    try:
        requests = prompts(6, seed=6)
        for case in (GREEDY, SEEDED):
            made, counts = counted(engine, requests, case)
            assert made == texts(plain, requests, params(**case))
            assert counts["errors"] == 0
    finally:
        shut(engine)
