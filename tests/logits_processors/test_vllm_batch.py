# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy_engine import config, params, toy_tokenizer
from toy_model import EOS
from vllm import SamplingParams
from vllm import tokenizers as vllm_tokenizers

from logits_processors import vllm_batch
from logits_processors.session import RefusedSession
from logits_processors.vllm_batch import Batch, eos_ids, wants_processor


def test_all_ids_that_end_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        vllm_tokenizers,
        "cached_tokenizer_from_config",
        lambda _: SimpleNamespace(eos_token_id=7),
    )

    def ids(configured: Any) -> tuple[int, ...]:
        model = SimpleNamespace(
            try_get_generation_config=lambda: {"eos_token_id": configured},
            get_vocab_size=lambda: 10,
        )
        return eos_ids(SimpleNamespace(model_config=model))

    assert ids(None) == ids([]) == ids(7) == (7,)
    assert ids(0) == (7,) or ids(0) == (7, 0)
    assert ids([3, 7, 99, -1]) == (7, 3)


@pytest.mark.parametrize("extra", [None, {}, {"x": 1}, {5: 1, None: 2}])
def test_others_get_no_session(extra: Any) -> None:
    sampling = SamplingParams(extra_args=extra)
    assert not wants_processor(sampling)
    assert Batch(config()).open(sampling, [0], []) is None


def test_a_request_that_was_not_vetted_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    toy_tokenizer(monkeypatch)
    batch = Batch(config())
    session = batch.open(params(constraint_method="no such"), [0], [])
    assert isinstance(session, RefusedSession)
    assert "constraint_method" in session.error
    logits = batch.edit(torch.zeros(1, 4), [(0, session, [])])
    assert logits.argmax().item() == EOS
    batch.close(session, [EOS])


@pytest.mark.parametrize(
    ("sampling", "prompt", "problem"),
    [
        (params(), None, "not of embeddings"),
        (params(constraint_prefix=3), [0, 1], "the prompt has only 2 tokens"),
        (params(constraint_prefix=1), [0, 2], "violates the constraint"),
        (params(constraint_ebnf="root ::= ("), [0], "ebnf"),
    ],
)
def test_what_only_the_engine_can_see_ends_in_a_record(
    sampling: Any, prompt: Any, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_tokenizer(monkeypatch)
    batch = Batch(config())
    session = batch.open(sampling, prompt, [])
    assert session is not None
    for _ in range(2):
        assert batch.edit(torch.zeros(1, 4), [(0, session, [])]).argmax().item() == EOS
    batch.close(session, [EOS])
    [record] = batch.records([], ["a"])
    assert record["state"] == "error"
    assert problem in record["error"]


def test_nan_logits_end_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    toy_tokenizer(monkeypatch)
    batch = Batch(config())
    good, bad = batch.open(params("good"), [0], []), batch.open(params("bad"), [0], [])
    assert good is not None
    assert bad is not None
    logits = torch.zeros(2, 4)
    logits[1] = math.nan
    edited = batch.edit(logits, [(0, good, []), (1, bad, [])])
    assert edited[1].argmax().item() == EOS
    assert torch.isfinite(edited.softmax(1)).all()
    found = {r["id"]: r["state"] for r in batch.records([], ["good", "bad"])}
    assert found == {"good": "incomplete", "bad": "error"}


def test_a_dead_end_can_still_be_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead end shows -1e30 where weights are shown; the row must still have a probability."""
    toy_tokenizer(monkeypatch)
    batch = Batch(config(logprobs_mode="processed_logits"))
    session = batch.open(params(method="asap", max_tokens=1, temperature=2.0), [0], [])
    assert session is not None
    edited = batch.edit(torch.zeros(1, 4), [(0, session, [])])
    assert edited.isfinite().sum() == 1
    assert (edited / 2.0).softmax(1)[0, EOS] == 1.0


def test_the_vocabulary_is_read_at_the_first_constraint(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(_: Any) -> Any:
        raise AssertionError("read too early")

    monkeypatch.setattr(vllm_batch, "load_vocabulary", unreadable)
    monkeypatch.setattr(vllm_batch, "eos_ids", lambda _: (EOS,))
    batch = Batch(config())
    assert batch.records([], ["a"]) == []
    sampling = SamplingParams(extra_args={"mirostat_version": 1}, max_tokens=5)
    session = batch.open(sampling, [0], [])
    assert session is not None
    assert batch.edit(torch.zeros(1, 4), [(0, session, [])]).isfinite().any()
