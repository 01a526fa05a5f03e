# SPDX-License-Identifier: Apache-2.0
"""Draft models on the whole engine.

The control: a target that drafts for itself in float32 is never wrong about a greedy token, so a
walk through its tree ends at a leaf, whatever vLLM did to the request in between. That needs the
draft's keys, positions, slots and mask to be right; each of them broken must show.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm_ext.engine import VOCAB, make_engine, make_tiny_model, prompts, texts
from tests.vllm_ext.test_engine import CASES, PROCESSORS, params
from vllm_ext.draft_vocab import FILE, save

pytestmark = pytest.mark.engine

LARGE: dict[str, Any] = {
    "method": "dyspec",
    "num_speculative_tokens": 10,
    "adaptive": False,
    "min_probability": 0.0,
}
GREEDY = {"ignore_eos": True}
SEEDED = {"temperature": 0.9, "seed": 3, "ignore_eos": True}


@pytest.fixture(scope="module", autouse=True)
def draft_worker() -> Iterator[None]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    patch = pytest.MonkeyPatch()
    patch.setattr("vllm_ext.config.CPU_WORKER", "tests.vllm_ext.draft_worker.DraftWorker")
    yield
    patch.undo()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def shut(engine: Any) -> None:
    engine.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def plain(model: Path) -> Iterator[Any]:
    engine = make_engine(model, None, logits_processors=PROCESSORS, max_num_batched_tokens=1024)
    yield engine
    shut(engine)


@pytest.fixture(scope="module")
def self_drafting(model: Path) -> Iterator[Any]:
    """The target as its own draft model, without other sources."""
    speculative = {**LARGE, "model": str(model), "sources": []}
    engine = make_engine(model, speculative, logits_processors=PROCESSORS)
    yield engine
    shut(engine)


def watched(engine: Any, requests: list[Any], case: dict[str, Any]) -> tuple[Any, dict[str, int]]:
    engine.collective_rpc("watch_drafts")
    made = texts(engine, requests, params(**case))
    return made, engine.collective_rpc("watch_drafts")[0]


def long_prompts(count: int) -> list[dict[str, list[int]]]:
    """Longer than a step's budget, with a common beginning of several blocks."""
    shared = prompts(1, seed=90, longest=60)[0]["prompt_token_ids"] * 60
    return [
        {"prompt_token_ids": shared[:130] + request["prompt_token_ids"]}
        for request in prompts(count, seed=91, longest=50)
    ]


@pytest.mark.parametrize(
    "requests",
    [prompts(1, seed=2), prompts(4, seed=3), prompts(9, seed=4), long_prompts(4)],
    ids=["one", "four", "more-than-fit", "chunked"],
)
def test_its_own_draft_is_always_right(plain: Any, self_drafting: Any, requests: Any) -> None:
    expected = texts(plain, requests, params(**GREEDY))
    self_drafting.reset_prefix_cache()
    for _ in range(2):  # the second time from cached prefixes
        made, counts = watched(self_drafting, requests, GREEDY)
        assert made == expected
        assert counts["trees"] > 5
        assert counts["branching"] > counts["trees"] / 2
        assert counts["accepted"] > counts["trees"]
        assert counts["inside"] == 0


def test_weights_are_held_once(self_drafting: Any) -> None:
    """Embeddings at least: vLLM's linear layers on a CPU are packed where they can be."""
    shared = self_drafting.collective_rpc("draft_state")[0]["shared_bytes"]
    assert shared >= VOCAB * 64 * 4


def test_cached_blocks_that_were_never_drafted_for(plain: Any, self_drafting: Any) -> None:
    """The prefix cache hands them out; their draft half must be computed before it is used."""
    requests = long_prompts(3)
    expected = texts(plain, requests, params(**GREEDY))
    self_drafting.reset_prefix_cache()
    silent = params(**GREEDY, extra_args={"speculation": False})
    assert texts(self_drafting, requests, silent) == expected
    made, counts = watched(self_drafting, requests, GREEDY)
    assert made == expected
    assert counts["trees"] > 5
    assert counts["inside"] == 0


def test_requests_that_draft_now_and_then(plain: Any, self_drafting: Any) -> None:
    """Neighbours without drafts share the passes' batch, and a request is read when it is asked."""
    requests = prompts(5, seed=12)
    each = [params(**GREEDY, extra_args={"max_nodes": n % 3 * 3}) for n in range(5)]
    assert texts(self_drafting, requests, each) == texts(plain, requests, params(**GREEDY))


@pytest.mark.parametrize("name", CASES)
def test_every_feature(plain: Any, self_drafting: Any, name: str) -> None:
    requests = prompts(6, seed=5)
    made, counts = watched(self_drafting, requests, CASES[name])
    assert made == texts(plain, requests, params(**CASES[name]))
    # Too short, or all that a random model drafts is what the grammar forbids.
    assert counts["trees"] or name in {"one_token", "two_tokens", "choice_seeded"}


def test_every_feature_in_one_batch(plain: Any, self_drafting: Any) -> None:
    mixed = [params(**options) for name, options in CASES.items() if name != "n"]
    requests = prompts(len(mixed), seed=14)
    assert texts(self_drafting, requests, mixed) == texts(plain, requests, mixed)


def test_finished_requests_are_forgotten(self_drafting: Any) -> None:
    texts(self_drafting, prompts(3, seed=8), params(max_tokens=5))
    texts(self_drafting, prompts(1, seed=9), params(max_tokens=5))
    assert self_drafting.collective_rpc("draft_state")[0]["texts"] <= 1


def test_every_broken_part_costs_acceptance_and_nothing_else(
    plain: Any, self_drafting: Any
) -> None:
    requests = prompts(6, seed=33) + long_prompts(2)
    expected = texts(plain, requests, params(**GREEDY))
    survivors = []
    for name in self_drafting.collective_rpc("break_draft", args=("none",))[0]:
        self_drafting.reset_prefix_cache()
        self_drafting.collective_rpc("break_draft", args=(name,))
        made, counts = watched(self_drafting, requests, GREEDY)
        assert made == expected
        if counts["inside"] < 0.05 * counts["trees"]:
            survivors.append(name)
    self_drafting.collective_rpc("break_draft", args=("none",))
    assert survivors == []


def test_a_draft_model_that_fails_is_dropped(plain: Any, self_drafting: Any) -> None:
    """Goes last: the engine drafts without a model from here on."""
    requests = prompts(3, seed=44)
    assert self_drafting.collective_rpc("draft_state")[0]["used"]
    before = self_drafting.collective_rpc("draft_state")[0]["drafting_errors"]
    self_drafting.collective_rpc("break_draft", args=("pass",))
    assert texts(self_drafting, requests, params(**GREEDY)) == texts(
        plain, requests, params(**GREEDY)
    )
    after = self_drafting.collective_rpc("draft_state")[0]
    assert not after["used"]
    assert after["drafting_errors"] == before + 1


def test_preempted_requests(plain: Any, model: Path) -> None:
    tight = make_engine(
        model,
        {**LARGE, "model": str(model), "sources": []},
        num_gpu_blocks_override=20,
    )
    try:
        requests = prompts(6, seed=50, longest=90)
        case = {"max_tokens": 110, "ignore_eos": True}
        made, counts = watched(tight, requests, case)
        assert made == texts(plain, requests, params(**case))
        preemptions = [m.value for m in tight.get_metrics() if m.name == "vllm:num_preemptions"]
        assert sum(preemptions) > 0
        assert counts["inside"] == 0
    finally:
        shut(tight)


@pytest.mark.slow
def test_a_compiled_draft_model(plain: Any, model: Path) -> None:
    own = {**LARGE, "model": str(model), "sources": []}
    compiled = make_engine(model, own, enforce_eager=False)
    try:
        requests = prompts(4, seed=3)
        made, counts = watched(compiled, requests, GREEDY)
        assert made == texts(plain, requests, params(**GREEDY))
        assert counts["branching"] > 5
        assert counts["inside"] == 0
    finally:
        shut(compiled)


def test_a_draft_vocabulary(plain: Any, model: Path, tmp_path: Path) -> None:
    """Cut to the tokens that are needed the draft is still always right, and drafts no others."""
    requests = prompts(4, seed=3)
    expected = texts(plain, requests, params(**GREEDY))
    counted = Counter(token for samples in expected for text in samples for token in text)
    needed = [token for token, _ in counted.most_common()]
    others = [token for token in range(VOCAB) if token not in counted]
    draft = Path(shutil.copytree(model, tmp_path / "draft"))
    for missing in (0, 1):  # the control: without the most frequent one it is not
        kept = [*needed[missing:], *others[: max(0, 100 - len(needed))]]
        assert len(kept) < VOCAB
        save(draft / FILE, kept)
        engine = make_engine(model, {**LARGE, "model": str(draft), "sources": []})
        try:
            made, counts = watched(engine, requests, GREEDY)
            state = engine.collective_rpc("draft_state")[0]
        finally:
            shut(engine)
        assert made == expected
        assert state["vocab"] == len(kept)
        assert counts["accepted"] > 5
        assert (counts["inside"] > 0) == bool(missing)


@pytest.mark.parametrize(
    "options",
    [
        {"adaptive": False, "num_speculative_tokens": 10},
        {"draft_dtype": "bfloat16", "max_model_len": 64},
    ],
    ids=["with-all-sources", "sized-by-cost"],
)
def test_another_model_drafts(
    plain: Any, model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Other weights, fewer layers, other heads: mostly wrong, and the text stays the same."""
    draft = make_tiny_model(
        tmp_path / "draft", seed=7, num_hidden_layers=1, num_attention_heads=2, hidden_size=32
    )
    engine = make_engine(model, {"method": "dyspec", "model": str(draft), **options})
    try:
        requests = prompts(6, seed=6) + long_prompts(2)
        before = engine.collective_rpc("draft_state")[0]
        for case in (GREEDY, SEEDED):
            made = texts(engine, requests, params(**case))
            if case is GREEDY:
                assert made == texts(plain, requests, params(**case))
            else:  # plain vLLM dies of a seed with a chunked prompt
                assert made[:6] == texts(plain, requests[:6], params(**case))
        after = engine.collective_rpc("draft_state")[0]
        assert after["used"]
        assert after["drafting_errors"] == before["drafting_errors"]
    finally:
        shut(engine)
