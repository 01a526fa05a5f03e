# SPDX-License-Identifier: Apache-2.0
"""The V2 adaptor on stand-in buffers: slots that are used again, prompts in parts, drafts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_engine import PLAIN, ToyV1, ToyV2, config, params, toy_tokenizer
from toy_model import EOS
from vllm import SamplingParams

METHODS = ("awrs", "masking", "asap", "cars")
PROMPT = [0, 1]


@pytest.fixture(autouse=True, scope="module")
def tokenizer() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        toy_tokenizer(patch)
        yield


def straight(method: str, seed: int) -> tuple[list[int], Any]:
    """The text and record that the V1 adaptor gives."""
    engine = ToyV1()
    engine.add("a", params("a", method, seed=seed), PROMPT)
    engine.run("a")
    return engine.texts["a"], engine.records("a")[0]


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 5),
    steps=st.lists(
        st.one_of(
            st.sampled_from(["plain", "preempt", "elsewhere", "right"]),
            st.lists(st.integers(0, 3), min_size=1, max_size=4),
        ),
        max_size=10,
    ),
)
def test_both_interfaces_give_the_same_text(method: str, seed: int, steps: Any) -> None:
    text, record = straight(method, seed)
    engine = ToyV2()
    sampling = params("a", method, seed=seed)
    slot = 0
    engine.add(slot, sampling, PROMPT)
    engine.add(3, PLAIN, PROMPT)
    for step in steps:
        so_far = engine.text(slot)
        if so_far[-1:] == [EOS]:
            break
        if step in ("preempt", "elsewhere"):
            old, slot = slot, (slot if step == "preempt" else (slot + 1) % 3)
            engine.add(slot, sampling, PROMPT, so_far)
            if so_far:
                engine.step({3: [], slot: []}, computed={slot: len(PROMPT)})
            if old != slot:
                engine.add(old, PLAIN, PROMPT)
        else:
            guess = text[len(so_far) :] if step == "right" else step
            engine.step({3: [1], slot: guess if isinstance(guess, list) else []})
    if engine.text(slot)[-1:] != [EOS]:
        engine.run(slot)
    assert engine.text(slot) == text
    assert engine.records("a") == [record]


def test_an_unfinished_prompt_draws_nothing() -> None:
    engine = ToyV2()
    engine.add(0, params(), [0, 1, 2, 0])
    assert engine.step({0: []}, computed={0: 2}) == {0: []}
    assert not engine.processor._sessions
    assert engine.shown.isfinite().all()
    engine.step({0: []})
    assert len(engine.text(0)) == 1


def test_a_draft_is_followed_as_far_as_it_is_right() -> None:
    text, record = straight("awrs", 4)
    wrong = [token ^ 1 for token in text]
    for right in range(6):
        engine = ToyV2()
        engine.add(0, params(seed=4), PROMPT)
        draft = text[:right] + wrong[right:5]
        assert engine.step({0: draft}) == {0: text[: right + 1]}
        beyond = engine.shown[right + 1 :]
        assert beyond.isfinite().all()  # rows that nobody looks at cost nothing
        if right < 5:
            engine.run(0)
        assert engine.records("a") == [record]


def test_a_slot_that_is_used_again_leaves_its_record() -> None:
    text, record = straight("awrs", 1)
    engine = ToyV2()
    engine.add(0, params("a"), PROMPT)
    engine.run(0)
    assert engine.add(0, PLAIN, PROMPT) is False
    assert not engine.processor._sessions
    assert not engine.processor._params
    assert engine.records("a") == [record]
    assert engine.add(0, params("b"), PROMPT) is True
    engine.run(0)
    assert engine.text(0) == text
    [again] = engine.records("b")
    assert again.log_weights == record.log_weights


def test_a_request_comes_back_before_its_old_slot_is_used_again() -> None:
    text, record = straight("awrs", 5)
    engine = ToyV2()
    engine.add(0, params(seed=5), PROMPT)
    engine.add(1, params("b", seed=8), PROMPT)
    engine.step({0: [], 1: []})
    engine.step({0: [], 1: []})
    engine.add(2, params(seed=5), PROMPT, engine.text(0))  # slot 1 is waiting, not gone
    engine.run(2)
    engine.run(1)
    assert engine.text(2) == text
    assert engine.records("a") == [record]
    [other] = engine.records("b")
    assert not any(math.isnan(weight) for weight in other.log_weights)
    assert other.state == "complete"


def test_a_batch_without_our_requests_costs_no_look_at_the_device() -> None:
    class Untouchable:
        def tolist(self) -> list[int]:
            raise AssertionError("the device was asked")

    engine = ToyV2()
    engine.add(0, params(), PROMPT)
    engine.run(0)
    engine.add(1, PLAIN, PROMPT)

    class Context:
        idx_mapping_np = np.array([1])
        expanded_idx_mapping = expanded_local_pos = pos = input_ids = Untouchable()

    logits: Any = object()
    assert engine.processor.apply(logits, Context()) is logits


def test_a_bad_request_ends_instead_of_the_engine() -> None:
    engine = ToyV2()
    bad = params(constraint_method="no such")
    assert engine.add(0, bad, PROMPT)
    assert engine.step({0: []}) == {0: [EOS]}
    engine.add(0, PLAIN, PROMPT)
    assert engine.records("a") == []


def test_weights_in_the_logits() -> None:
    engine = ToyV2(config(logprobs_mode="processed_logits"))
    engine.add(0, params(method="asap", temperature=0.5, max_tokens=4), PROMPT)
    shown = []
    for _ in range(3):
        [token] = engine.step({0: []})[0]
        shown.append(float(engine.shown[0, token]) / 0.5)
    assert shown == pytest.approx(engine.records("a")[0].log_weights, rel=1e-5)


def test_twins_without_a_seed_differ_and_ranks_agree() -> None:
    def texts() -> list[list[int]]:
        engine = ToyV2(slots=8)
        for slot in range(8):
            engine.add(slot, params(None, seed=None), PROMPT)
        for slot in range(8):
            engine.run(slot)
        return [engine.text(slot) for slot in range(8)]

    first = texts()
    assert first == texts()
    assert len(set(map(tuple, first))) > 1


@pytest.mark.parametrize("right", [True, False])
def test_momentum_rules_every_draft(right: bool) -> None:
    sampling = SamplingParams(extra_args={"momentum_alpha": 0.2}, max_tokens=20)
    plain = ToyV2()
    plain.add(0, sampling, PROMPT)
    plain.run(0)
    text = plain.text(0)
    assert len(text) > 5
    drafted = ToyV2()
    drafted.add(0, sampling, PROMPT)
    drafted.step({0: text[:4] if right else [text[0], text[1] ^ 1]})
    drafted.run(0)
    assert drafted.text(0) == text


@pytest.mark.parametrize("last", [[], [0], [-1, -1]])
def test_mirostat_keeps_count_along_drafts(last: list[int]) -> None:
    keys = {"mirostat_version": 2, "mirostat_tau": 1.0, "mirostat_eta": 0.5}
    sampling = SamplingParams(extra_args=keys, max_tokens=20)
    plain, drafted = ToyV2(), ToyV2()
    for engine in (plain, drafted):
        engine.add(0, sampling, PROMPT)
    for _ in range(6):
        plain.step({0: []})
    text = plain.text(0)
    drafted.step({0: [text[0], text[1] ^ 1, text[2]]})  # a wrong one, and what would follow it
    drafted.step({0: text[2:4]})
    old = drafted.processor._sessions[0]
    drafted.add(1, sampling, PROMPT, drafted.text(0))  # preempted, and in another slot
    drafted.add(0, PLAIN, PROMPT)
    drafted.step({1: last})
    session = drafted.processor._sessions[1]
    assert session is old
    assert len(session._surprise) == 1 + sum(token >= 0 for token in last)  # no row of the past
    plain.step({0: []})
    session.follow(text)
    assert session._caps == plain.processor._sessions[0]._caps


@pytest.mark.parametrize("keys", [{"mirostat_version": 2}, {"momentum_alpha": 0.2}])
def test_small_processors_run_too(keys: Any) -> None:
    engine = ToyV2()
    engine.add(0, SamplingParams(extra_args=keys, seed=1, max_tokens=5), PROMPT)
    for _ in range(5):
        engine.step({0: []})
    kept = engine.shown[0].isfinite().sum()
    assert kept == 1 if "momentum_alpha" in keys else 1 <= kept <= 4
