# SPDX-License-Identifier: Apache-2.0
"""How many nodes a step has room for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.worker.drafting import Drafting, batch_limit


@given(st.integers(1, 10_000), st.integers(0, 500))
def test_prompts_keep_half_of_what_decoding_leaves(budget: int, decoding: int) -> None:
    nodes = batch_limit(budget, decoding)
    left = budget - decoding
    assert 0 <= nodes <= max(0, left)
    assert left - nodes >= max(0, left) / 2 or left < 0
    assert nodes >= (left - 1) / 2 or left < 0  # and no more than half


def test_a_full_batch_has_no_nodes() -> None:
    assert batch_limit(96, 8) == 44
    assert batch_limit(96, 96) == batch_limit(96, 200) == 0


class Watcher:
    """A drafter that keeps what it sees."""

    def __init__(self, watches: bool) -> None:
        self.watches = watches
        self.seen: list[tuple[list[str], list[list[float]]]] = []

    def start(self, *args: Any, **kwargs: Any) -> None:
        pass

    def see(self, requests: list[str], states: torch.Tensor) -> None:
        self.seen.append((requests, states.tolist()))


def test_each_newest_token_is_shown_with_the_row_that_it_was_drawn_from() -> None:
    hidden = torch.arange(12.0)[:, None]
    step: Any = SimpleNamespace(starts=[0, 4, 5, 9])
    walked: Any = SimpleNamespace(paths=[(0, 2), (), (), (1,)])
    params = SimpleNamespace(temperature=0.0, structured_outputs=None)
    state = SimpleNamespace(
        num_tokens=2,
        prompt_token_ids=[1],
        output_token_ids=[2],
        sampling_params=params,
        lora_request=None,
    )
    ids, limits = ["deep", "unread", "plain", "unknown"], {"deep": 9, "plain": 1, "unknown": 9}
    for watches in (True, False):
        watcher: Any = Watcher(watches)
        drafting = Drafting(watcher, trees=True)
        for request in ids[:3]:
            drafting.start(request, state)
        drafting.see(step, walked, ids, limits, hidden)
        # Of the tree at row 0 the nodes 0 and 2 were accepted: the last token follows row 1 + 2.
        expected = [(["deep", "plain"], [[3.0], [5.0]])] if watches else []
        assert watcher.seen == expected
        drafting.see(step, walked, ids, {"deep": 0, "plain": 0}, hidden)
        assert watcher.seen == expected
