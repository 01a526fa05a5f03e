# SPDX-License-Identifier: Apache-2.0
"""A step without drafts: vLLM's own sampling, and as little beside it as can be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from proposers.tree import TokenTree
from tests.vllm_ext.worker.test_device_walk import metadata
from vllm_ext.enclosed import ATTRIBUTE
from vllm_ext.worker.cpu import TreeCPUModelRunner
from vllm_ext.worker.runner import TreeRunnerMixin
from vllm_ext.worker.step import Step, build_step
from vllm_ext.worker.walk import WalkResult

TREE = TokenTree((5, 6), (-1, -1), (0.5, 0.4))
LOGITS = torch.nn.functional.one_hot(torch.tensor([3, 5, 7]), 16).float()


class Stock:
    """The parts of vLLM's runner that are called."""

    sampled = 0
    drafts: Any = None

    def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
        assert spec_decode_metadata is None
        self.sampled += 1
        drawn = self.sampler(logits=logits, sampling_metadata=self.input_batch.sampling_metadata)
        logits.zero_()  # it may: a processor writes into them
        return drawn

    def sample_tokens(self, grammar_output: Any) -> Any:
        return SimpleNamespace(req_ids=["x", "y"])

    def take_draft_token_ids(self) -> Any:
        return self.drafts


class Runner(TreeRunnerMixin, Stock):  # type: ignore[misc]
    walk_is_timed = True

    def __init__(self, trees: dict[str, TokenTree], count: int) -> None:
        self.sampler = Sampler()
        self.timed: list[tuple[float, float]] = []
        self._timer: Any = SimpleNamespace(
            work_outside=lambda seconds, sampling: self.timed.append((seconds, sampling))
        )
        self._drafting: Any = SimpleNamespace(listens=lambda step: self.listening)
        self.listening = False
        names = [f"r{i}" for i in range(count)]
        scheduled = {r: list(t.tokens) for r, t in trees.items()}
        sizes = [1 + len(scheduled.get(name, ())) for name in names]
        starts = np.cumsum([0, *sizes], dtype=np.int32)
        self._step = build_step(names, scheduled, trees, starts, np.zeros(count, dtype=np.int32))
        self.input_batch = SimpleNamespace(
            num_reqs=count,
            generators={},
            sampling_metadata=metadata(count),
            req_output_token_ids=[[] for _ in names],
            logitsprocs=SimpleNamespace(all=[]),
        )
        self._undrawn_rows: list[int] = []
        self.compilation_config = SimpleNamespace(static_forward_context={})
        self._slot_mappings_by_layer = dict  # type: ignore[method-assign]

    def _undrawn(self) -> list[int]:
        return self._undrawn_rows


def test_a_step_without_drafts_is_plain() -> None:
    empty = TokenTree.EMPTY
    assert Step([empty, empty], [0, 1], None, 0).plain
    assert not Step([empty, TREE], [0, 1], None, 0).plain
    assert build_step(["x"], {}, {"x": TREE}, np.array([0, 1]), np.array([0])).plain


@pytest.mark.parametrize("listening", [False, True])
def test_a_plain_step_is_sampled_by_vllm(listening: bool) -> None:
    runner = Runner({}, 3)
    runner.listening = listening
    output = runner._sample(LOGITS.clone(), None)
    assert runner.sampled == 1
    assert output.sampled_token_ids.tolist() == [[3], [5], [7]]
    assert (runner._seen is not None) == listening
    if listening:
        assert runner._seen.ids[:, 0].tolist() == [3, 5, 7]
    ((seconds, sampling),) = runner.timed
    assert 0 < sampling <= seconds


def test_other_steps_are_walked() -> None:
    drafted = Runner({"r0": TREE}, 1)
    output = drafted._sample(LOGITS, None)
    assert drafted.sampled == 0
    assert isinstance(drafted._walked, WalkResult)
    # The root's row says 3, which nobody drafted.
    assert output.sampled_token_ids.tolist() == [[3]]
    waiting = Runner({}, 3)
    waiting._undrawn_rows = [1]  # its generator must stay where it is
    waiting._sample(LOGITS, None)
    assert waiting.sampled == 0
    drawn = Runner({}, 3)
    drawn._sampled = SimpleNamespace()  # drafts drawn by a rule keep an account of every step
    drawn._verify = lambda logits, step: (None, WalkResult([[3], [5], [7]], [[]] * 3, [None]))
    drawn._sample(LOGITS, None)
    assert drawn.sampled == 0


def test_what_a_plain_step_emitted_is_read_from_the_bookkeeping() -> None:
    walked = WalkResult.plain([[3], [], [7]])  # the second one's prompt is unfinished
    assert walked.tokens == [[3], [], [7]]
    assert walked.paths == [[], [], []]


@pytest.mark.parametrize("drawn_rule", [None, SimpleNamespace()])
@pytest.mark.parametrize("rests", [True, False])
def test_a_step_that_rests_makes_nothing_ready(rests: bool, drawn_rule: Any) -> None:
    called: list[Any] = []

    def note(name: str, answer: Any = None) -> Any:
        return lambda *args, **given: called.append((name, given.get("asked"))) or answer

    state = SimpleNamespace(sampling_params=SimpleNamespace(extra_args=None), num_tokens=5)
    drafting = SimpleNamespace(
        trees={},
        drafter=SimpleNamespace(gate=None),
        learn=note("learn"),
        see=note("see"),
        rests=note("rests", rests),
        propose=note("propose"),
    )
    runner: Any = SimpleNamespace(
        _drafting=drafting,
        _walked=None,
        _step=None,
        _seen=None,
        _sampled=drawn_rule,
        _late=None,
        _predictor=None,
        _token_budget=64,
        max_model_len=5,  # no room for nodes
        num_spec_tokens=4,
        requests={"x": state},
        _settle_pearl=note("pearl"),
        _learn_draws=note("draws"),
        _draw_trees=note("draw", {}),
        _prune_forbidden=note("prune"),
        _count_decisions=note("count"),
    )
    state.sampling_params.max_tokens = None
    scheduled = SimpleNamespace(num_scheduled_tokens={"x": 1})
    assert TreeRunnerMixin._draft(runner, scheduled, ["x"], [[3]], [], LOGITS) == {}
    assert runner._walked.tokens == [[3]]
    names = [name for name, _ in called]
    assert {"pearl", "learn", "count"} <= set(names)
    # Drawn drafts have a gate of their own, so there the drafter asks its gate itself.
    assert ("rests" in names) == (drawn_rule is None)
    if rests and drawn_rule is None:
        assert not {"see", "draw", "propose", "prune"} & set(names)
    else:
        assert ("propose", drawn_rule is None) in called


def test_no_drafts_are_not_sent() -> None:
    runner = Runner({}, 2)
    runner.drafts = SimpleNamespace(req_ids=["x", "y"], draft_token_ids=[[], []])
    assert getattr(runner.sample_tokens(None), ATTRIBUTE) == (None,)
    runner.drafts = SimpleNamespace(req_ids=["x", "y"], draft_token_ids=[[], [5]])
    assert getattr(runner.sample_tokens(None), ATTRIBUTE) == (runner.drafts,)


def _metadata_of(cls: type, drafts: list[int], scheduled: list[int]) -> Any:
    runner = object.__new__(cls)
    runner.device = torch.device("cpu")
    runner.arange_np = np.arange(64)
    runner._arange_scratch = np.empty(64, dtype=np.int64)
    runner.input_ids = SimpleNamespace(gpu=torch.arange(64, dtype=torch.int32))
    return runner._calc_spec_decode_metadata(
        np.array(drafts, dtype=np.int32), np.cumsum(scheduled, dtype=np.int32)
    )


@pytest.mark.parametrize("scheduled", [[1], [1, 1, 1], [1, 17, 1], [4, 9]])
def test_rows_to_sample_are_those_of_the_stock_method(scheduled: list[int]) -> None:
    none = [0] * len(scheduled)
    for _ in range(2):  # what is kept between steps is not what differs between them
        stock = _metadata_of(GPUModelRunner, none, scheduled)
        ours = _metadata_of(TreeCPUModelRunner, none, scheduled)
        for name in stock.__dataclass_fields__:
            expected, found = getattr(stock, name), getattr(ours, name)
            if isinstance(expected, torch.Tensor):
                assert found.tolist() == expected.tolist(), name
                assert found.dtype == expected.dtype, name
            else:
                assert found == expected, name
        assert ours.max_spec_len == stock.max_spec_len
        scheduled = [n + 1 for n in scheduled]


def test_with_drafts_the_stock_method_is_asked() -> None:
    stock = _metadata_of(GPUModelRunner, [2, 0], [3, 1])
    ours = _metadata_of(TreeCPUModelRunner, [2, 0], [3, 1])
    assert ours.logits_indices.tolist() == stock.logits_indices.tolist() == [0, 1, 2, 3]
    assert ours.num_draft_tokens == [2, 0]
