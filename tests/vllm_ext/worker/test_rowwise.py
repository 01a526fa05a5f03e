# SPDX-License-Identifier: Apache-2.0
"""Levels of the walk with the rows that still draw, instead of the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from logits_processors.vllm_v1 import V1Processor
from proposers.tree import TokenTree
from tests.vllm_ext.worker.test_device_walk import Batch, gpu_sampler, metadata
from vllm_ext.worker import walk as module
from vllm_ext.worker.rowwise import why_sequential
from vllm_ext.worker.walk import WalkResult, walk


class Counting(Sampler):
    """vLLM's sampler, which counts the rows that it is given."""

    rows = 0

    def forward(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stock."""
        self.rows += len(logits)
        return super().forward(logits, *args, **kwargs)


def walked(batch: Batch, given: SamplingMetadata, *, rowwise: bool) -> tuple[WalkResult, int]:
    sampler = Counting()
    torch.manual_seed(0)
    histories: list[list[int] | None] = [[] for _ in batch.trees]
    result = walk(
        sampler,
        batch.logits.clone(),
        given,
        batch.trees,
        batch.starts,
        histories,
        lambda live: None,
        rowwise=rowwise,
    )
    return result, sampler.rows


def reproducible(batch: Batch) -> Sequence[int]:
    """Greedy and seeded requests; what others draw depends on the generator of the process."""
    temperature = batch.given.temperature
    return [
        request
        for request in range(len(batch.trees))
        if request in batch.generators or temperature is None or temperature[request] == 0
    ]


@pytest.mark.parametrize("kind", ["greedy", "seeded", "mixed"])
def test_same_tokens_from_fewer_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 0)
    deepest = whole_rows = live_rows = 0
    for seed in range(100):
        batch = Batch(seed, kind)
        one, other = batch.metadata(), batch.metadata()
        (whole, more), (live, fewer) = (
            walked(batch, one, rowwise=False),
            walked(batch, other, rowwise=True),
        )
        for request in reproducible(batch):
            assert live.tokens[request] == whole.tokens[request]
            assert live.paths[request] == whole.paths[request]
        for request, generator in one.generators.items():
            assert torch.equal(generator.get_state(), other.generators[request].get_state())
        if kind == "mixed":
            continue
        assert fewer <= more
        assert fewer == sum(map(len, live.tokens))
        deepest = max(deepest, *map(len, live.paths))
        whole_rows, live_rows = whole_rows + more, live_rows + fewer
    assert kind == "mixed" or (deepest >= 4 and live_rows < 0.7 * whole_rows)


def test_a_small_greedy_batch_is_sampled_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 1 << 30)
    deepest = 0
    for seed in range(100):
        batch = Batch(seed, "greedy")
        whole, _ = walked(batch, batch.metadata(), rowwise=False)
        once, rows = walked(batch, batch.metadata(), rowwise=True)
        assert rows == len(batch.logits)
        assert (once.tokens, once.paths) == (whole.tokens, whole.paths)
        deepest = max(deepest, *map(len, once.paths))
    assert deepest >= 4


def test_rows_sampled_at_once_keep_to_what_their_request_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forbidden = torch.zeros(2, 4, dtype=torch.bool)
    forbidden[1, 3] = True  # what the second request's model likes best
    trees = [TokenTree.chain([3, 3], [0.5, 0.4]), TokenTree.chain([2, 3], [0.5, 0.4])]
    logits = torch.arange(4.0).repeat(6, 1)
    given = replace(
        metadata(2),
        temperature=None,
        all_greedy=True,
        all_random=False,
        allowed_token_ids_mask=forbidden,
    )

    def tokens(rowwise: bool) -> list[list[int]]:
        histories: list[list[int] | None] = [[], []]
        walking = (trees, [0, 3], histories, lambda live: None)
        return walk(Sampler(), logits.clone(), given, *walking, rowwise=rowwise).tokens

    assert tokens(True) == tokens(False) == [[3, 3, 3], [2, 2]]
    right = module.part_of  # the control: what the rows get belongs to the other request
    monkeypatch.setattr(module, "part_of", lambda g, owners: right(g, [1 - o for o in owners]))
    assert tokens(True) != tokens(False)


def test_parameters_of_a_neighbour_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the rows get what belongs to the first requests of the batch."""
    right = module.part_of
    monkeypatch.setattr(module, "part_of", lambda given, live: right(given, list(range(len(live)))))
    assert any(
        walked(b, b.metadata(), rowwise=True)[0].tokens
        != walked(b, b.metadata(), rowwise=False)[0].tokens
        for b in (Batch(seed, "seeded") for seed in range(20))
    )


def test_what_needs_the_sequential_walk() -> None:
    plain = metadata(2)
    assert why_sequential(gpu_sampler(), plain) is None
    reasons = {
        "logprobs": {"max_num_logprobs": 0},
        "penalties": {"no_penalties": False},
        "bad words": {"bad_words_token_ids": {0: [[1]]}},
    }
    for reason, given in reasons.items():
        assert why_sequential(gpu_sampler(), replace(plain, **given)) == reason
    scoring = replace(plain, logprob_token_ids={0: [1]})
    assert why_sequential(gpu_sampler(), scoring) == "logprobs"


class _Subclass(Sampler):
    pass


class _Stranger(MinPLogitsProcessor):
    """Not vLLM's own: what it looks at is not known."""

    min_p_count = 0


def test_samplers_that_are_not_vllms_own() -> None:
    assert why_sequential(_Subclass(), metadata(1)) == "sampler _Subclass"
    assert why_sequential(Sampler(use_fp64_gumbel=True), metadata(1)) == "float64 noise"


def test_logits_processors_count_when_they_act() -> None:
    def processor(cls: type, **state: Any) -> Any:
        made: Any = object.__new__(cls)
        made.__dict__.update(state)
        return made

    idle = [
        processor(MinTokensLogitsProcessor, min_toks={}),
        processor(LogitBiasLogitsProcessor, biases={}),
        processor(MinPLogitsProcessor, min_p_count=0),
        processor(V1Processor, _rows={}),
    ]
    given = metadata(1, logitsprocs=LogitsProcessors(idle))
    assert why_sequential(gpu_sampler(), given) is None
    actions = ({"min_toks": {0: 1}}, {"biases": {0: 1}}, {"min_p_count": 1}, {"_rows": {0: ()}})
    for index, acting in enumerate(actions):
        processors = copy.copy(idle)
        processors[index] = processor(type(idle[index]), **acting)
        given = metadata(1, logitsprocs=LogitsProcessors(processors))
        assert "logits processor" in str(why_sequential(gpu_sampler(), given))
    given = metadata(1, logitsprocs=LogitsProcessors([processor(_Stranger)]))
    assert "_Stranger" in str(why_sequential(gpu_sampler(), given))
