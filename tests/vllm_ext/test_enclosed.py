# SPDX-License-Identifier: Apache-2.0
"""Drafts in a step's output: they arrive, once, and where there are none vLLM's message is sent."""

from __future__ import annotations

import pickle
from concurrent.futures import Future
from typing import Any

import pytest
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, DraftTokenIds, ModelRunnerOutput

from vllm_ext import enclosed, plugin
from vllm_ext.enclosed import ATTRIBUTE, enclose

ASKED = DraftTokenIds(["a"], [[7]])
"""What a worker answers to vLLM's message."""


class Executor(MultiprocExecutor):
    """Without workers: it writes messages down, and replies from `outputs`."""

    output_rank = 0
    kv_output_aggregator = ec_output_aggregator = None

    def __init__(self, *outputs: Any) -> None:
        self.outputs = list(outputs)
        self.messages: list[str] = []

    def collective_rpc(self, method: Any, *_: Any, **__: Any) -> Any:
        self.messages.append(method)
        return ASKED if method == "take_draft_token_ids" else self.outputs.pop(0)


def output(*drafts: DraftTokenIds | None) -> ModelRunnerOutput:
    """A step's output as it arrives from another process; without an argument, of vLLM's own."""
    made = ModelRunnerOutput(["a"], {"a": 0}, [[5]])
    if drafts:
        assert enclose(made, drafts[0]) is made
    return pickle.loads(pickle.dumps(made))  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _registered() -> None:
    plugin.register()


def test_enclosed_drafts_need_no_message() -> None:
    drafts = DraftTokenIds(["a"], [[1, 2]])
    executor = Executor(output(drafts), output(None))
    assert executor.sample_tokens(None).sampled_token_ids == [[5]]
    assert executor.take_draft_token_ids() == drafts
    executor.sample_tokens(None)
    assert executor.take_draft_token_ids() is None
    assert executor.messages == ["sample_tokens", "sample_tokens"]


def test_without_enclosed_drafts_the_worker_is_asked() -> None:
    executor = Executor(output())
    executor.sample_tokens(None)
    assert executor.take_draft_token_ids() == ASKED
    assert executor.messages == ["sample_tokens", "take_draft_token_ids"]


def test_drafts_are_handed_out_once_and_never_for_a_later_step() -> None:
    executor = Executor(output(DraftTokenIds(["a"], [[1]])), output(DraftTokenIds(["a"], [[2]])))
    executor.sample_tokens(None)
    executor.take_draft_token_ids()
    assert executor.take_draft_token_ids() == ASKED
    executor.outputs.append(output())
    executor.sample_tokens(None)  # its drafts are not fetched
    executor.sample_tokens(None)
    assert executor.take_draft_token_ids() == ASKED


def test_a_future_has_nothing_enclosed() -> None:
    executor = Executor(Future[Any]())
    executor.sample_tokens(None, non_block=True)
    assert executor.take_draft_token_ids() == ASKED


def test_the_output_that_all_empty_steps_share_is_left_alone() -> None:
    enclose(EMPTY_MODEL_RUNNER_OUTPUT, ASKED)
    assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, ATTRIBUTE)
    assert enclose(None, ASKED) is None


def test_installing_twice_wraps_once() -> None:
    wrapped = MultiprocExecutor.sample_tokens, MultiprocExecutor.take_draft_token_ids
    enclosed.install()
    assert (MultiprocExecutor.sample_tokens, MultiprocExecutor.take_draft_token_ids) == wrapped
