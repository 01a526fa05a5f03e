# SPDX-License-Identifier: Apache-2.0
"""``generate`` over a stand-in for ``LLM``: order, names, noise, restarts, errors."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams

from logits_processors.session import Record
from vllm_ext.constraints import generate, offline, results
from vllm_ext.constraints.offline import log_weight
from vllm_ext.constraints.records import RPC


class FakeLLM:
    """Answers each prompt with its own letters; rejects a text as often as its prompt says."""

    def __init__(self) -> None:
        self.stored: list[Record] = []
        self.calls: list[tuple[list[str], list[SamplingParams]]] = []
        self.rejected: dict[str, int] = {}

    def generate(self, prompts: Any, params: Any, use_tqdm: bool) -> list[Any]:
        self.calls.append((prompts, params))
        outputs = []
        for prompt, asked in zip(prompts, params, strict=True):
            times = int(prompt.rpartition("!")[2] or 0) if "!" in prompt else 0
            self.rejected[prompt] = self.rejected.get(prompt, 0) + 1
            state: Any = "restart" if self.rejected[prompt] <= times else "complete"
            if prompt.startswith("dead"):
                state = "dead_end"
            tokens = [ord(c) for c in prompt]
            weights = [-1.0] * len(tokens)
            extra = asked.extra_args["constraint_id"]
            self.stored.append(Record(extra, tokens, weights, 0, 0, state))
            completion = SimpleNamespace(text=prompt, token_ids=tuple(tokens))
            outputs.append(SimpleNamespace(outputs=[completion]))
        return outputs

    def collective_rpc(self, method: str, args: Any) -> Any:
        assert method == RPC
        found = [vars(r) for r in reversed(self.stored) if r.id in args[0]]
        self.stored = [r for r in self.stored if r.id not in args[0]]
        return [found, found]


REGEX = {"constraint_regex": "a"}


def test_samples_come_in_the_order_of_the_prompts() -> None:
    llm = FakeLLM()
    given = SamplingParams(extra_args=REGEX | {"constraint_id": "theirs"})
    samples = generate(llm, ["b!2", "a", "c!1", "a"], given)
    assert [s.text for s in samples] == ["b!2", "a", "c!1", "a"]
    assert [s.attempts for s in samples] == [3, 1, 2, 1]
    assert [prompts for prompts, _ in llm.calls] == [
        ["b!2", "a", "c!1", "a"],
        ["b!2", "c!1"],
        ["b!2"],
    ]
    assert [s.log_weight for s in samples] == [-3.0, -1.0, -3.0, -1.0]
    assert given.extra_args == REGEX | {"constraint_id": "theirs"}  # the caller's stay theirs
    names = [p.extra_args["constraint_id"] for _, params in llm.calls for p in params]
    assert len(set(names)) == 7
    assert not llm.stored


@pytest.mark.parametrize("seed", [0, 5, 2**63 - 1, -(2**63)])
def test_an_attempt_has_its_own_noise(seed: int) -> None:
    llm = FakeLLM()
    keyed = SamplingParams(extra_args=REGEX | {"constraint_seed": seed})
    seeded = SamplingParams(extra_args=REGEX, seed=seed)
    generate(llm, ["a!3", "b!3", "c!3"], [keyed, seeded, SamplingParams(extra_args=REGEX)])
    keys = [params[0].extra_args["constraint_seed"] for _, params in llm.calls]
    seeds = [params[1].seed for _, params in llm.calls]
    assert keys == seeds
    assert keys[0] == seed
    assert len(set(keys)) == 4
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert {params[2].seed for _, params in llm.calls} == {None}
    assert (keyed.extra_args, seeded.seed) == (REGEX | {"constraint_seed": seed}, seed)


def test_rejection_ends_somewhere() -> None:
    [sample] = generate(FakeLLM(), ["a!9"], SamplingParams(extra_args=REGEX), max_restarts=2)
    assert (sample.record.state, sample.attempts, sample.log_weight) == ("restart", 3, -math.inf)


def test_more_prompts_than_an_engine_keeps_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "_AT_ONCE", 3)
    llm = FakeLLM()
    prompts = [f"{i}!{i % 2}" for i in range(8)]
    samples = generate(llm, prompts, SamplingParams(extra_args=REGEX))
    assert [s.text for s in samples] == prompts
    assert max(len(prompts) for prompts, _ in llm.calls) == 3


def test_no_prompts_no_work() -> None:
    assert generate(FakeLLM(), [], SamplingParams(extra_args=REGEX)) == []


def test_bad_arguments() -> None:
    llm = FakeLLM()
    with pytest.raises(ValueError, match="2 sampling parameters for 1 prompts"):
        generate(llm, ["a"], [SamplingParams()] * 2)
    with pytest.raises(ValueError, match="n is above 1"):
        generate(llm, ["a"], SamplingParams(n=2))
    assert not llm.calls


def test_an_engine_without_our_processor_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = FakeLLM()
    monkeypatch.setattr(llm, "collective_rpc", lambda *_, **__: [[]])
    with pytest.raises(RuntimeError, match="doctor"):
        generate(llm, ["a"], SamplingParams(extra_args=REGEX))


def test_weights_of_texts() -> None:
    def record(state: Any, weights: list[float]) -> Record:
        return Record("", [0] * len(weights), weights, 0, 0, state)

    assert log_weight(record("complete", [-1.0, -0.5]), 2) == -1.5
    assert log_weight(record("complete", [-1.0, -0.5]), 1) == -math.inf  # cut off before its end
    for state in ("incomplete", "dead_end", "restart", "error"):
        assert log_weight(record(state, [-1.0]), 1) == -math.inf
    assert math.isnan(log_weight(record("complete", [math.nan, 0.0]), 2))


def test_dead_ends_are_samples_of_weight_zero() -> None:
    [sample] = generate(FakeLLM(), ["dead"], SamplingParams(extra_args=REGEX))
    assert (sample.log_weight, sample.record.state) == (-math.inf, "dead_end")


def test_results_are_popped() -> None:
    llm = FakeLLM()
    llm.stored = [Record("a", [1], [0.0], 0, 0, "complete")]
    assert [r.token_ids for r in results(llm, iter(["a", "b"]))["a"]] == [[1]]
    assert results(llm, ["a", "b"]) == {"a": [], "b": []}
