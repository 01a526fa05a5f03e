# SPDX-License-Identifier: Apache-2.0
"""Trees never starve prompts: a long prompt beside running requests, with a tiny token budget."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
from vllm import SamplingParams

from tests.vllm_ext.engine import make_engine, make_tiny_model, prompts, spec_metrics, texts

pytestmark = pytest.mark.engine

SPECULATIVE = {"method": "dyspec", "num_speculative_tokens": 16, "adaptive": False}
RUNNING, BUDGET, PROMPT, LONGEST = 8, 96, 500, 2048
WARM, PATIENCE = 80, 40


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm_ext.config.CPU_WORKER", "tests.vllm_ext.prefill_worker.PrefillWorker")
        made = make_engine(
            make_tiny_model(tmp_path_factory.mktemp("model"), max_len=LONGEST),
            dict(SPECULATIVE),
            max_model_len=LONGEST,
            max_num_seqs=RUNNING + 1,
            max_num_batched_tokens=BUDGET,
            enable_prefix_caching=False,
        )
    yield made
    made.llm_engine.engine_core.shutdown()


def steps_to_read(engine: Any, *, speculation: bool) -> float:
    """Steps that read a long prompt, beside running requests.

    Infinite if it is not read within our patience.
    """
    core: Any = engine.llm_engine
    engine.collective_rpc("watch")
    endless = SamplingParams(
        temperature=0.0,
        max_tokens=LONGEST - 100,
        ignore_eos=True,
        detokenize=False,
        extra_args={"speculation": speculation},
    )
    running = [
        core.add_request(f"running{i}", prompt, endless) or f"running{i}"
        for i, prompt in enumerate(prompts(RUNNING))
    ]
    outputs: list[Any] = []
    for _ in range(WARM):  # until the running requests' trees are full
        outputs = core.step()
    assert len(outputs) == RUNNING
    text = (prompts(1, seed=9)[0]["prompt_token_ids"] * PROMPT)[:PROMPT]
    short = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
    long = core.add_request("long", {"prompt_token_ids": text}, short) or "long"
    for _ in range(PATIENCE):
        if any(o.finished and o.request_id.startswith("long") for o in core.step()):
            break
    core.abort_request([*running, long])
    while core.has_unfinished_requests():
        core.step()
    steps = engine.collective_rpc("steps_to_read", args=("long", PROMPT))[0]
    return steps if steps > 0 else math.inf


def test_a_long_prompt_takes_at_most_about_twice_the_steps(engine: Any) -> None:
    alone = steps_to_read(engine, speculation=False)
    assert alone == -(-PROMPT // (BUDGET - RUNNING))
    assert alone < steps_to_read(engine, speculation=True) <= 2 * alone
    # Control: without the limit the trees of the running requests take the whole budget.
    engine.collective_rpc("lift_the_limit")
    assert steps_to_read(engine, speculation=True) > 3 * alone


def test_drafts_need_no_message_of_their_own(engine: Any) -> None:
    drafted = spec_metrics(engine)["num_draft_tokens"]
    texts(engine, prompts(2), SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True))
    assert spec_metrics(engine)["num_draft_tokens"] > drafted
    assert engine.collective_rpc("messages_for_drafts") == [0]
    # Control: without them the worker is asked after every step.
    engine.collective_rpc("enclose_nothing")
    texts(engine, prompts(1), SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))
    assert engine.collective_rpc("messages_for_drafts")[0] > 0
