# SPDX-License-Identifier: Apache-2.0
"""The V2 adaptor in vLLM's own Model Runner V2: in Triton's interpreter, or on a GPU.

``real_v2.py`` says what of the runner is real and what is replaced, ``v2_kernels.py`` what stands
for a GPU where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from toy_engine import MODEL, PLAIN, ToyV1, params, toy_tokenizer
from toy_model import EOS, LANGUAGE, TINY
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import loader

from logits_processors.mirostat import Mirostat

pytestmark = [
    pytest.mark.interpreter,
    # numpy, behind the interpreter, tells of what a GPU does silently: log 0, infinity - infinity.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

METHODS = ("awrs", "masking", "asap", "cars")
NEIGHBOUR = SamplingParams(max_tokens=10, seed=3)
MEMBERS = [[*(int(character) for character in text), EOS] for text in LANGUAGE]


@pytest.fixture(autouse=True, scope="module")
def tokenizer() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        toy_tokenizer(patch)
        yield


@pytest.fixture(scope="module")
def v2() -> Any:
    """The module ``real_v2``, which not every process can import."""
    import real_v2

    return real_v2


@pytest.fixture(scope="module")
def alone(v2: Any) -> list[int]:
    """The text of the neighbour when nobody else is there."""
    engine = v2.RealV2()
    engine.add("b", NEIGHBOUR)
    engine.run("b")
    return list(engine.texts["b"])


def straight(method: str, seed: int, **options: Any) -> tuple[list[int], Any]:
    """The text and record that the V1 adaptor gives."""
    engine = ToyV1()
    engine.add("a", params("a", method, seed=seed, **options))
    engine.run("a")
    return engine.texts["a"], engine.records("a")[0]


def guess(engine: Any, **texts: Sequence[int]) -> Callable[[str], Sequence[int]]:
    """Drafts that are right for the named requests if ``texts`` are; none for others."""
    return lambda name: texts.get(name, [])[len(engine.texts[name]) :]


@pytest.mark.parametrize(("method", "seed"), [*((method, 1) for method in METHODS), ("cars", 5)])
def test_the_text_is_that_of_v1_and_the_neighbour_keeps_its_own(
    v2: Any, alone: list[int], method: str, seed: int
) -> None:
    text, record = straight(method, seed)
    assert (text in MEMBERS) == (record.state == "complete")
    assert record.state == ("restart" if seed == 5 else "complete")
    engine = v2.RealV2()
    engine.add("b", NEIGHBOUR)
    engine.add("a", params("a", method, seed=seed))
    while engine.known:
        emitted = list(engine.step())
        if "b" in emitted:
            row = emitted.index("b")
            assert torch.equal(engine.shown[row], engine.given[row])
    assert engine.texts == {"a": text, "b": alone}
    assert engine.records("a") == [record]


def test_without_our_processor_the_text_breaks_the_constraint(
    v2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [str(seed) for seed in range(4)]

    def texts() -> list[list[int]]:
        engine = v2.RealV2()
        for seed, name in enumerate(names):
            engine.add(name, params(name, seed=seed))
        engine.run(*names)
        return [engine.texts[name] for name in names]

    assert all(text in MEMBERS for text in texts())
    monkeypatch.setattr(loader, "entry_points", lambda group: [])
    assert not all(text in MEMBERS for text in texts())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("verify", ["standard", "block"])
def test_drafts_change_nothing(v2: Any, alone: list[int], method: str, verify: str) -> None:
    text, record = straight(method, 3)
    for right in range(1, 6, 2):
        draft = text[:right] + [token ^ 1 for token in text[right:]]
        engine = v2.RealV2(verify)
        engine.add("a", params("a", method, seed=3))
        engine.add("b", NEIGHBOUR)
        engine.run("a", "b", drafts=guess(engine, a=draft))
        assert engine.texts == {"a": text, "b": alone}
        assert engine.records("a") == [record]


def test_as_many_drafts_are_accepted_as_are_right(v2: Any) -> None:
    text, _ = straight("awrs", 4)
    for right in range(v2.DRAFTS):
        engine = v2.RealV2()
        engine.add("a", params("a", seed=4))
        assert engine.step() == {"a": text[:1]}
        draft = text[1 : right + 1] + [token ^ 1 for token in text[right + 1 : v2.DRAFTS + 1]]
        assert engine.step({"a": draft}) == {"a": text[1 : right + 2]}


@pytest.mark.parametrize("verify", ["standard", "block"])
def test_drafts_with_a_law_in_a_padded_batch_verified_in_chunks(
    v2: Any, alone: list[int], verify: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, record = straight("asap", 2)
    other, _ = straight("awrs", 5)
    row = TINY.size * 4  # bytes
    generator = torch.Generator().manual_seed(0)
    law = torch.randn(v2.SLOTS, v2.DRAFTS, TINY.size, generator=generator).to(v2.DEVICE)
    for rows in (1, 6):
        monkeypatch.setattr(v2.rejection_sampler, "MAX_CHUNK_BYTES", rows * row)
        engine = v2.RealV2(verify, padding=2, draft_logits=law)
        for name, sampling in (
            ("c", params("c", seed=5)),
            ("a", params("a", "asap", seed=2)),
            ("b", NEIGHBOUR),
        ):
            engine.add(name, sampling)
        engine.run("a", "b", "c", drafts=guess(engine, a=text, c=[2] * 10))
        assert engine.texts == {"a": text, "b": alone, "c": other}
        assert engine.records("a") == [record]


def test_slots_are_used_again(v2: Any) -> None:
    texts = {name: straight("awrs", seed)[0] for seed, name in enumerate("abcd")}
    engine = v2.RealV2()
    slots = []
    for seed, name in enumerate(texts):
        engine.add(name, params(name, seed=seed))
        engine.step()
        slots.append(engine.slot(name))
        engine.run(name)
        engine.add(f"plain {name}", PLAIN)
        engine.step()
        slots.append(engine.slot(f"plain {name}"))
        engine.run(f"plain {name}")
    assert len(set(slots)) == 1
    assert {name: engine.texts[name] for name in texts} == texts
    assert [record.token_ids for record in engine.records(*texts)] == list(texts.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("most", [3, 9])
def test_preempted_requests_come_back_in_any_slot(v2: Any, method: str, most: int) -> None:
    text, record = straight(method, 3)
    other, _ = straight("masking", 8)
    engine = v2.RealV2()
    engine.add("a", params("a", method, seed=3))
    engine.add("b", params("b", "masking", seed=8))
    engine.step()
    engine.step({"a": text[1:2], "b": [2, 2]})
    before = engine.slot("a"), engine.slot("b")
    engine.step(scheduled=[], preempted=["a", "b"])
    engine.step(scheduled=["a"], most=most)  # in parts or not, in the slot that was freed last
    engine.step(scheduled=["b"])
    assert (engine.slot("b"), engine.slot("a")) == before
    engine.run("a", "b")
    assert engine.texts == {"a": text, "b": other}
    assert engine.records("a") == [record]


def test_a_prompt_in_parts_draws_once(v2: Any) -> None:
    text, record = straight("awrs", 1)
    engine = v2.RealV2()
    engine.add("a", params("a"), [0, 1, 2, 0, 1])
    assert engine.step(most=2) == {"a": []}
    assert engine.step(most=2) == {"a": []}
    assert engine.step(most=2) == {"a": text[:1]}
    engine.run("a")
    assert engine.texts["a"] == text
    assert engine.records("a") == [record]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.7, "top_k": 3}])
def test_the_law_is_the_request_s(v2: Any, options: Any) -> None:
    text, record = straight("awrs", 2, **options)
    engine = v2.RealV2()
    engine.add("a", params("a", seed=2, **options))
    engine.run("a", drafts=guess(engine, a=[*text[:3], 2, 2]))
    assert engine.texts["a"] == text
    assert engine.records("a") == [record]


def test_weights_are_logprobs(v2: Any) -> None:
    engine = v2.RealV2(logprobs_mode="processed_logits")
    sampling = params("a", "asap", temperature=0.5, logprobs=0)
    engine.add("a", sampling)
    engine.run("a", drafts=lambda name: [1, 0, 1])
    [record] = engine.records("a")
    assert any(weight != 0.0 for weight in record.log_weights)
    assert engine.logprobs["a"] == pytest.approx(record.log_weights, rel=1e-5)


def test_momentum_under_drafts(v2: Any) -> None:
    sampling = SamplingParams(extra_args={"momentum_alpha": 0.2}, max_tokens=10)
    plain, drafted = v2.RealV2(), v2.RealV2()
    for engine in (plain, drafted):
        engine.add("a", sampling)
    plain.run("a")
    text = plain.texts["a"]
    drafted.run("a", drafts=guess(drafted, a=[*text[:4], text[4] ^ 1, *text[5:]]))
    assert drafted.texts["a"] == text


def test_mirostat_under_drafts_and_preemption(v2: Any) -> None:
    keys = {"mirostat_version": 2, "mirostat_tau": 0.6, "mirostat_eta": 0.5}
    endless = {EOS: -100.0}
    core = Mirostat(2, 0.6, 0.5)
    for seed in range(3):
        engine = v2.RealV2()
        sampling = SamplingParams(extra_args=keys, seed=seed, max_tokens=20, logit_bias=endless)
        engine.add("a", sampling)
        for step in range(5):
            if step == 3:
                engine.step(scheduled=[], preempted=["a"])
                engine.add("b", PLAIN)
                engine.step(scheduled=["b"])  # in the slot of the other
            ready = engine.known["a"].in_batch
            engine.step({"a": [1, 0, 1]} if ready else {}, scheduled=["a"])
        text, caps = engine.texts["a"], [core.initial_mu]
        assert len(text) > 5
        for position, token in enumerate(text):
            row = MODEL.logits(text[:position]).astype(np.float32)
            row[EOS] += endless[EOS]
            surprise = core.surprise(row)
            assert core.keep(surprise, caps[-1])[token]
            caps.append(core.update(caps[-1], float(surprise[token])))
        session = engine.processors[0]._sessions[engine.slot("a")]
        session.follow(text)
        assert session._caps == pytest.approx(caps)


def test_a_bad_request_ends_instead_of_the_engine(v2: Any) -> None:
    engine = v2.RealV2()
    engine.add("a", params("a", constraint_method="no such"))
    engine.add("b", params("b"))
    engine.run("a", "b")
    assert engine.texts == {"a": [EOS], "b": straight("awrs", 1)[0]}
