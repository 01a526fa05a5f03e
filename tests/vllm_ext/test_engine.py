# SPDX-License-Identifier: Apache-2.0
"""The whole engine, with and without us: the tokens must be the same.

Trees are forced to be large (``adaptive`` off), so that branches are verified in every step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm_ext.engine import (
    MAX_LEN,
    VOCAB,
    make_adapter,
    make_engine,
    make_tiny_model,
    prompts,
    spec_metrics,
    texts,
)

pytestmark = pytest.mark.engine

SPECULATIVE = {
    "method": "dyspec",
    "num_speculative_tokens": 12,
    "adaptive": False,
    "min_probability": 0.0,
}
PROCESSORS = ["tests.vllm_ext.processors:AlternatingBan"]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """Plain vLLM and ours, side by side."""
    model = make_tiny_model(tmp_path_factory.mktemp("model"))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    patch = pytest.MonkeyPatch()
    patch.setattr("vllm_ext.config.CPU_WORKER", "tests.vllm_ext.mutants.MutantWorker")
    # Plain vLLM dies of a seed with a chunked prompt on the CPU, so it gets room for whole prompts.
    plain = make_engine(model, None, logits_processors=PROCESSORS, max_num_batched_tokens=1024)
    ours = make_engine(model, dict(SPECULATIVE), logits_processors=PROCESSORS)
    yield plain, ours
    patch.undo()
    for engine in (plain, ours):
        engine.llm_engine.engine_core.shutdown()


def params(**options: Any) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    if "structured_outputs" in options:
        structured = StructuredOutputsParams(**options["structured_outputs"])
        options = {**options, "structured_outputs": structured}
    return SamplingParams(**{"max_tokens": 40, "temperature": 0.0, "detokenize": False, **options})


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}

CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "ignore_eos": {"ignore_eos": True},
    "seeded": {"temperature": 0.9, "seed": 3},
    "top_k": {"temperature": 1.0, "seed": 4, "top_k": 5},
    "top_p": {"temperature": 0.8, "seed": 5, "top_p": 0.9},
    "min_p": {"temperature": 1.2, "seed": 6, "min_p": 0.1},
    "penalties": {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
    },
    "penalties_seeded": {"temperature": 0.9, "seed": 2, "frequency_penalty": 0.7},
    "logit_bias": {"logit_bias": {5: 4.0, 17: -8.0}},
    "allowed_token_ids": {"allowed_token_ids": list(range(0, VOCAB, 3))},
    "bad_words": {"bad_words": ["a", "q", "th", "(("], "detokenize": True},
    "min_tokens": {"min_tokens": 20, "stop_token_ids": list(range(2, 100))},
    "stop_token_ids": {"stop_token_ids": list(range(5, 40)), "ignore_eos": True},
    "stop_strings": {"stop": ["k", "Z", "&", "7", "p", "!"], "detokenize": True},
    "n": {"temperature": 0.9, "seed": 8, "n": 3},
    "one_token": {"max_tokens": 1},
    "two_tokens": {"max_tokens": 2},
    "json": {
        "structured_outputs": {"json": SCHEMA},
        "detokenize": True,
    },
    "choice_seeded": {
        "structured_outputs": {"choice": ["alpha", "alpine", "beta", "alphabet soup"]},
        "temperature": 1.0,
        "seed": 3,
        "detokenize": True,
    },
    "processor": {"extra_args": {"ban": 3}, "ignore_eos": True},
    "processor_seeded": {"extra_args": {"ban": 4}, "temperature": 0.8, "seed": 1},
}


@pytest.mark.parametrize("name", CASES)
def test_same_tokens(engines: tuple[Any, Any], name: str) -> None:
    plain, ours = engines
    requests = prompts(8, seed=len(name))
    expected = texts(plain, requests, params(**CASES[name]))
    assert texts(ours, requests, params(**CASES[name])) == expected
    assert texts(ours, requests[:1], params(**CASES[name])) == texts(
        plain, requests[:1], params(**CASES[name])
    )


def test_same_tokens_when_every_request_differs(engines: tuple[Any, Any]) -> None:
    plain, ours = engines
    mixed = [params(**options) for name, options in CASES.items() if name != "n"]
    requests = prompts(len(mixed), seed=11)
    assert texts(ours, requests, mixed) == texts(plain, requests, mixed)


def test_trees_branch_and_are_accepted(engines: tuple[Any, Any]) -> None:
    _, ours = engines
    texts(ours, prompts(24, seed=5), params(ignore_eos=True))
    counters = ours.collective_rpc("tree_counters")[0]
    assert counters["branching_trees"] > 50
    assert counters["accepted_tokens"] > 20
    assert counters["emitted_tokens"] >= counters["accepted_tokens"] + counters["request_steps"]
    metrics = spec_metrics(ours)
    assert metrics["num_accepted_tokens"] > 20
    assert metrics["num_draft_tokens"] > metrics["num_accepted_tokens"]


def test_nothing_is_compiled_while_requests_wait(engines: tuple[Any, Any]) -> None:
    """A second for a kernel at the first tree is a second that a request waits."""
    _, ours = engines
    before = ours.collective_rpc("tree_counters")[0]
    texts(ours, prompts(24, seed=6), params(ignore_eos=True))
    after = ours.collective_rpc("tree_counters")[0]
    assert after["branching_trees"] > before["branching_trees"]
    at_start, later = ours.collective_rpc("compiled_kernels")[0]
    if not at_start:
        pytest.skip("tree attention is not compiled on this machine")
    assert any("attend" in kernel for kernel in at_start)
    assert not later


def test_logprobs_are_those_of_the_accepted_rows(engines: tuple[Any, Any]) -> None:
    plain, ours = engines
    requests = prompts(5, seed=2)
    wanted = params(logprobs=3, prompt_logprobs=2, ignore_eos=True, flat_logprobs=False)
    for theirs, mine in zip(
        plain.generate(requests, wanted, use_tqdm=False),
        ours.generate(requests, wanted, use_tqdm=False),
        strict=True,
    ):
        assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
        for a, b in zip(mine.outputs[0].logprobs, theirs.outputs[0].logprobs, strict=True):
            assert a.keys() == b.keys()
            for token in a:
                assert a[token].logprob == pytest.approx(b[token].logprob, abs=1e-3)
                assert a[token].rank == b[token].rank
        assert len(mine.prompt_logprobs) == len(theirs.prompt_logprobs)


def test_generates_to_the_last_position(engines: tuple[Any, Any]) -> None:
    plain, ours = engines
    requests = prompts(3, seed=9)
    endless = params(max_tokens=None, ignore_eos=True)
    expected = texts(plain, requests, endless)
    cut = ours.collective_rpc("cut_trees")[0]
    assert texts(ours, requests, endless) == expected
    assert ours.collective_rpc("cut_trees")[0] > cut  # the last trees were too large
    lengths = [
        len(request["prompt_token_ids"]) + len(samples[0])
        for request, samples in zip(requests, expected, strict=True)
    ]
    assert set(lengths) == {MAX_LEN}


def test_cached_prefixes_change_nothing(engines: tuple[Any, Any]) -> None:
    plain, ours = engines
    requests = prompts(4, seed=40)
    ours.reset_prefix_cache()
    first = texts(ours, requests, params(ignore_eos=True))
    longer = [
        {"prompt_token_ids": request["prompt_token_ids"] + samples[0][:30]}
        for request, samples in zip(requests, first, strict=True)
    ]
    # The prefixes now come from blocks that hold committed tree nodes.
    assert texts(ours, longer, params(ignore_eos=True)) == texts(
        plain, longer, params(ignore_eos=True)
    )


def test_seed_with_a_chunked_prompt(engines: tuple[Any, Any]) -> None:
    """vLLM's CPU engine alone dies of this (it rolls back a generator that cannot be).

    So the plain engine, which has room for whole prompts, does not chunk these.
    """
    plain, ours = engines
    long = prompts(2, seed=4, longest=60)
    long = [{"prompt_token_ids": (p["prompt_token_ids"] * 60)[:200]} for p in long]
    sampled = params(temperature=0.9, seed=12, max_tokens=20)
    expected = texts(plain, long, sampled)
    assert len({tuple(text) for (text,) in expected}) == len(long)
    ours.reset_prefix_cache()
    assert texts(ours, long, sampled) == expected
    assert texts(ours, long, sampled) == expected  # again, now from cached prefixes
    short = prompts(1, seed=1)
    assert texts(ours, short, sampled) == texts(plain, short, sampled)


def test_abort_leaves_the_others_alone(engines: tuple[Any, Any]) -> None:
    plain, ours = engines
    requests = prompts(5, seed=21)
    expected = texts(plain, requests, params(ignore_eos=True))
    engine = ours.llm_engine
    finished: dict[str, list[int]] = {}
    ids = [
        engine.add_request(f"a{i}", request, params(ignore_eos=True)) or f"a{i}"
        for i, request in enumerate(requests)
    ]
    for step in range(1000):
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
        if step == 3:
            engine.abort_request([ids[1], ids[3]])
        if not engine.has_unfinished_requests():
            break
    by_index = {int(name.split("-")[0][1:]): tokens for name, tokens in finished.items()}
    for index in (0, 2, 4):
        assert by_index[index] == expected[index][0]


def test_a_failing_drafter_costs_drafts_only(engines: tuple[Any, Any]) -> None:
    plain, ours = engines
    requests = prompts(4, seed=60)
    before = ours.collective_rpc("tree_counters")[0]
    ours.collective_rpc("break_drafting_once")
    assert texts(ours, requests, params()) == texts(plain, requests, params())
    after = ours.collective_rpc("tree_counters")[0]
    assert after["drafting_errors"] == before["drafting_errors"] + 1
    assert after["drafted_nodes"] > before["drafted_nodes"]


def test_a_request_may_refuse_or_limit_drafts(engines: tuple[Any, Any]) -> None:
    plain, ours = engines
    requests = prompts(4, seed=61)
    expected = texts(plain, requests, params(ignore_eos=True))

    def drafted(**extra: Any) -> float:
        before = ours.collective_rpc("tree_counters")[0]
        assert texts(ours, requests, params(ignore_eos=True, extra_args=extra)) == expected
        after = ours.collective_rpc("tree_counters")[0]
        change = {name: after[name] - before[name] for name in after}
        assert (change["capped_requests"] > 0) == bool(extra)
        return change["drafted_nodes"] / change["request_steps"]

    assert drafted() > 1.2
    assert 0 < drafted(max_nodes="1") <= 1
    assert drafted(speculation=False) == 0
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="max_nodes='x'"):
        ours.generate(requests, params(extra_args={"max_nodes": "x"}), use_tqdm=False)


def test_every_mutation_changes_the_text(engines: tuple[Any, Any]) -> None:
    """What exactness rests on, taken away one thing at a time."""
    plain, ours = engines
    requests = prompts(6, seed=33)
    sampled = [
        params(temperature=0.9, seed=i, ignore_eos=True, max_tokens=30 + i) for i in range(6)
    ]
    processed = [params(extra_args={"ban": 3}, min_tokens=12, max_tokens=30) for _ in range(6)]
    stopping = [
        params(min_tokens=15, stop_token_ids=list(range(2, VOCAB)), max_tokens=30) for _ in range(6)
    ]
    cases = [sampled, processed, stopping]
    expected = [texts(plain, requests, case) for case in cases]
    survivors = []
    for name in ours.collective_rpc("mutate", args=("none",))[0]:
        ours.collective_rpc("mutate", args=(name,))
        ours.reset_prefix_cache()
        if [texts(ours, requests, case) for case in cases] == expected:
            survivors.append(name)
    ours.collective_rpc("mutate", args=("none",))
    ours.reset_prefix_cache()
    assert survivors == []
    assert [texts(ours, requests, case) for case in cases] == expected


def test_candidates_at_prompt_rows_are_learnt(engines: tuple[Any, Any]) -> None:
    import torch

    plain, ours = engines
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5))
    tokens = (2 + order).tolist()  # each of them once
    one = {"prompt_token_ids": tokens}
    told = params(prompt_logprobs=1, max_tokens=2, ignore_eos=True)
    (output,) = plain.generate([one], told, use_tqdm=False)
    emitted = list(output.outputs[0].token_ids)
    after = [
        next(token for token, said in at.items() if said.rank == 1)
        for at in output.prompt_logprobs[1:]
    ]
    asked = [place for place, token in enumerate(tokens[:-1]) if token not in emitted]
    others = prompts(6, seed=62)
    cases = [params(ignore_eos=True), params(temperature=0.9, seed=3, ignore_eos=True)]
    try:
        for rows in (0, 16):
            ours.reset_prefix_cache()
            ours.collective_rpc("draft_from_prompts", args=(rows,))
            assert texts(ours, [one], params(max_tokens=2, ignore_eos=True)) == [[emitted]]
            (found,) = ours.collective_rpc("best_bigrams", args=([tokens[i] for i in asked],))
            learnt = range(len(tokens) - 1 - rows, len(tokens) - 1)
            assert found == [after[i] if i in learnt else -1 for i in asked]
            assert set(found) > {-1} or not rows
            for case in cases:
                assert texts(ours, others, case) == texts(plain, others, case)
    finally:
        ours.collective_rpc("draft_from_prompts", args=(-1,))


@pytest.fixture(scope="module")
def tight_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """Ours with so few KV blocks that requests are preempted and resumed, and so small a budget of
    tokens that trees are cut; and the model.
    """
    model = make_tiny_model(tmp_path_factory.mktemp("model"))
    engine = make_engine(
        model,
        {**SPECULATIVE, "num_speculative_tokens": 8},
        num_gpu_blocks_override=20,
        max_num_batched_tokens=32,
    )
    yield engine, model
    engine.llm_engine.engine_core.shutdown()


def test_trees_cut_by_the_schedulers_budget_give_the_same_text(
    engines: tuple[Any, Any], tight_engine: tuple[Any, Any]
) -> None:
    plain, _ = engines
    tight, _ = tight_engine
    requests = prompts(6, seed=51, longest=20)
    tight.collective_rpc("cut_trees")
    # Trees that leave room for prompts are hardly ever cut.
    tight.collective_rpc("leave_room_for_prompts", args=(False,))
    for case in (params(ignore_eos=True), params(temperature=0.9, seed=2, ignore_eos=True)):
        before = tight.collective_rpc("cut_trees")[0]
        assert texts(tight, requests, case) == texts(plain, requests, case)
        assert tight.collective_rpc("cut_trees")[0] > before
    tight.collective_rpc("leave_room_for_prompts", args=(True,))


def test_preempted_requests_resume_with_the_same_text(
    engines: tuple[Any, Any], tight_engine: tuple[Any, Any]
) -> None:
    plain, _ = engines
    tight, _ = tight_engine
    requests = prompts(6, seed=50, longest=90)
    for case in (
        params(max_tokens=120, ignore_eos=True),
        params(temperature=0.9, seed=1, max_tokens=90),
    ):
        assert texts(tight, requests, case) == texts(plain, requests, case)
    preemptions = [m.value for m in tight.get_metrics() if m.name == "vllm:num_preemptions"]
    assert sum(preemptions) > 0


def test_adapters_get_their_own_text(tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    model = make_tiny_model(tmp_path / "model")
    adapter = LoRARequest("adapter", 1, str(make_adapter(model, tmp_path / "adapter")))
    requests = prompts(6, seed=3)
    answers = []
    for speculative in (None, dict(SPECULATIVE)):
        engine = make_engine(
            model, speculative, enable_lora=True, max_lora_rank=8, max_num_batched_tokens=512
        )
        outputs = engine.generate(
            requests,
            params(ignore_eos=True),
            use_tqdm=False,
            lora_request=[adapter, None] * 3,
        )
        answers.append([list(output.outputs[0].token_ids) for output in outputs])
        answers.append([t[0] for t in texts(engine, requests, params(ignore_eos=True))])
        engine.llm_engine.engine_core.shutdown()
    with_adapter, without, ours_with, ours_without = answers
    assert ours_with == with_adapter
    assert ours_without == without
    assert with_adapter[0] != without[0]


@pytest.fixture(scope="module")
def resources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model with a primed table and a datastore."""
    import numpy as np

    from proposers.datastore_build import build
    from proposers.prime import PrimeTable
    from vllm_ext.identity import tokenizer_hash
    from vllm_ext.model_files import identity_of

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    folder = tmp_path_factory.mktemp("resources")
    model = make_tiny_model(folder / "model")
    ids = np.arange(2 * 8, dtype=np.int32).reshape(-1, 8) % VOCAB
    table = PrimeTable(np.arange(2, dtype=np.int32), ids, np.full((2, 8), 0.1, np.float32))
    table.save(folder / "prime", identity_of(model))
    make_head().save(folder / "head", identity_of(model))
    (folder / "text.txt").write_text("the cat sat on the mat " * 9)
    build(
        [folder / "text.txt"],
        folder / "store",
        encode=lambda texts: [[ord(c) for c in text] for text in texts],
        tokenizer=tokenizer_hash(model),
        vocab_size=VOCAB,
    )
    files = {"prime": "prime", "datastore": "store", "head": "head"}
    return {"model": model, **{name: str(folder / file) for name, file in files.items()}}


def make_head() -> Any:
    """A random draft head of the tiny model; what it drafts is mostly wrong."""
    import torch

    from proposers.hydra import HydraHead

    drawn = torch.Generator().manual_seed(0)
    shapes = {
        "inner": (16, 64),
        "inputs": (VOCAB, 16),
        "outer": (64, 16),
        "scale": (64,),
        "gain": (64,),
        "outputs": (VOCAB + 1, 64),
        "bias": (VOCAB + 1,),
    }
    parts = {name: torch.randn(shape, generator=drawn) for name, shape in shapes.items()}
    return HydraHead(tokens=torch.arange(VOCAB), **parts)


def test_a_head_sees_the_state_that_the_newest_token_was_drawn_from(
    resources: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("vllm_ext.config.CPU_WORKER", "tests.vllm_ext.mutants.MutantWorker")
    options = {"method": "dyspec", "max_nodes": 12, "adaptive": False, "head": resources["head"]}
    engine = make_engine(resources["model"], options)
    try:
        engine.collective_rpc("record_states")
        requests = prompts(12, seed=72)
        for case in (params(ignore_eos=True), params(temperature=0.9, seed=3, ignore_eos=True)):
            texts(engine, requests, case)
        counters = engine.collective_rpc("tree_counters")[0]
        (seen,) = engine.collective_rpc("recorded_states")
    finally:
        engine.llm_engine.engine_core.shutdown()
    assert counters["accepted_tokens"] > 9  # so that states come from rows of trees as well
    assert counters["branching_trees"] > 5
    assert len(seen) > 50
    model = AutoModelForCausalLM.from_pretrained(resources["model"], dtype=torch.float32)
    one_off = 0
    for known, state in seen:
        with torch.inference_mode():
            states = model.model(torch.tensor([known])).last_hidden_state[0]
        torch.testing.assert_close(torch.tensor(state), states[-2], rtol=1e-3, atol=1e-3)
        one_off += bool(torch.allclose(torch.tensor(state), states[-1], rtol=1e-2, atol=1e-2))
    assert one_off < len(seen) / 4  # control: a neighbouring row's state is another one


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("token_recycling", {}),
        ("aded", {}),
        ("rasd", {"datastore": True, "prime": True, "past_outputs_mib": 1}),
        ("suffix_tree", {"past_outputs_mib": 1}),
        ("copy", {}),
        ("datastore", {"datastore": True}),
        ("dyspec", {"sources": ["suffix", "copy", "store", "bigram", "failing"], "prime": True}),
        ("dyspec", {"sources": ["bigram"], "head": True}),
    ],
)
def test_every_method_gives_the_same_tokens(
    engines: tuple[Any, Any],
    resources: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    method: str,
    options: dict[str, Any],
) -> None:
    # A package that is installed as far as Python can tell, in the worker's process as well.
    package = tmp_path / "failing-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Name: failing\nVersion: 1.0\n")
    entry = "[vllm_ext.sources]\nfailing = tests.vllm_ext.failing_source:Failing\n"
    (package / "entry_points.txt").write_text(entry)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("vllm_ext.config.CPU_WORKER", "tests.vllm_ext.mutants.MutantWorker")
    named = {key: resources[key] if value is True else value for key, value in options.items()}
    speculative = {"method": method, "max_nodes": 12, "adaptive": False, **named}
    plain, _ = engines
    engine = make_engine(resources["model"], speculative)
    before = engine.collective_rpc("tree_counters")[0]
    try:
        requests = prompts(6, seed=71)
        begun = texts(plain, requests, params(ignore_eos=True))
        for request, (text,) in zip(requests, begun, strict=True):
            request["prompt_token_ids"] += text  # the model goes round in circles: input to copy
        for case in (params(ignore_eos=True), params(temperature=0.9, seed=3, ignore_eos=True)):
            assert texts(engine, requests, case) == texts(plain, requests, case)
        after = engine.collective_rpc("tree_counters")[0]
        assert after["drafting_errors"] == before["drafting_errors"]
        failing = [name for name in options.get("sources", ()) if name == "failing"]
        assert engine.collective_rpc("failed_sources")[0] == failing
        log = "".join(capfd.readouterr())  # of the engine's processes as well
        assert log.count("is disabled, it failed with") == len(failing)
        assert log.count("source 'failing' is disabled") == len(failing)
        if method != "datastore":  # random bytes do not occur in its text
            assert after["accepted_tokens"] > before["accepted_tokens"]
    finally:
        engine.llm_engine.engine_core.shutdown()


@pytest.mark.slow
def test_tensor_parallel_ranks_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    model = make_tiny_model(tmp_path / "model")
    requests = prompts(6, seed=3)
    answers = []
    for speculative in (None, dict(SPECULATIVE)):
        engine = make_engine(model, speculative, tensor_parallel_size=2, max_num_batched_tokens=512)
        answers.append(
            [
                texts(engine, requests, params(ignore_eos=True)),
                texts(engine, requests, params(temperature=0.9, seed=3)),
            ]
        )
        engine.llm_engine.engine_core.shutdown()
    assert answers[0] == answers[1]
