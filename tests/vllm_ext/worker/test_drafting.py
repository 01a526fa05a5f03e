# SPDX-License-Identifier: Apache-2.0
"""How many nodes a step has room for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proposers.grower import ENDLESS
from proposers.tree import TokenTree
from vllm_ext.worker.drafting import LISTEN_EVERY, Candidates, Drafting, batch_limit
from vllm_ext.worker.step import Step
from vllm_ext.worker.walk import WalkResult


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


def state_of(*output: int) -> Any:
    """The engine's state of a request with a prompt of one token."""
    return SimpleNamespace(
        num_tokens=1 + len(output),
        prompt_token_ids=[1],
        output_token_ids=list(output),
        get_token_id=[1, *output].__getitem__,
        sampling_params=SimpleNamespace(temperature=0.0, structured_outputs=None, max_tokens=None),
        lora_request=None,
    )


@pytest.mark.parametrize(("max_tokens", "told"), [(None, ENDLESS), (64, 65)])
def test_the_drafter_is_told_where_a_request_ends(max_tokens: int | None, told: int) -> None:
    """Also one that has been preempted, and begins anew with what it had generated."""
    given: list[dict[str, Any]] = []
    drafter: Any = SimpleNamespace(start=lambda *args, **kwargs: given.append(kwargs))
    drafting = Drafting(drafter, trees=True)
    for state in (state_of(2), state_of(2, 3, 4)):
        state.sampling_params.max_tokens = max_tokens
        drafting.start("r", state)
    assert [one["longest"] for one in given] == [told, told]


def test_each_newest_token_is_shown_with_the_row_that_it_was_drawn_from() -> None:
    hidden = torch.arange(12.0)[:, None]
    step: Any = SimpleNamespace(starts=[0, 4, 5, 9])
    walked: Any = SimpleNamespace(paths=[(0, 2), (), (), (1,)])
    state = state_of(2)
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


class Listener:
    """A drafter that counts what it is told."""

    def __init__(self) -> None:
        self.drafts = True
        self.observed = self.extended = 0

    def start(self, *args: Any, **kwargs: Any) -> None:
        pass

    def observe(self, rows: Any) -> None:
        self.observed += 1

    def extend(self, request: str, tokens: list[int]) -> None:
        self.extended += 1


def step_of(tree: TokenTree) -> Step:
    return Step([tree], [0], None, 0)


def test_while_nothing_is_drafted_few_steps_are_learnt_from() -> None:
    listener: Any = Listener()
    drafting = Drafting(listener, trees=True)
    plain, drafted = step_of(TokenTree.EMPTY), step_of(TokenTree.chain([3], [0.5]))
    assert all(drafting.listens(plain) for _ in range(3))
    listener.drafts = False
    heard = [drafting.listens(plain) for _ in range(4 * LISTEN_EVERY)]
    assert sum(heard) == 4
    assert heard.index(True) == LISTEN_EVERY - 1
    assert all(drafting.listens(drafted) for _ in range(3))  # a trial: its rows are there
    assert not drafting.listens(plain)


@pytest.mark.parametrize("rests", [True, False])
def test_only_requests_that_are_known_are_asked_about(rests: bool) -> None:
    listener: Any = Listener()
    listener.rests = lambda *asked: listener.__dict__.update(asked=asked) or rests
    drafting = Drafting(listener, trees=True)
    drafting.start("a", state_of(2))
    drafting.trees = {"a": TokenTree.chain([3], [0.5])}
    assert drafting.rests(["a", "stranger"], 7) == rests
    assert listener.asked == (1, 7)
    assert (drafting.trees == {}) == rests  # nothing of the step before is left


def test_a_step_that_is_not_learnt_from_still_tells_the_tokens() -> None:
    listener: Any = Listener()
    drafting = Drafting(listener, trees=True)
    step, walked = step_of(TokenTree.EMPTY), WalkResult([[4]], [[]], [])
    seen = Candidates(np.zeros((1, 8), np.int64), np.zeros((1, 8), np.float32))
    drafting.start("a", state_of(2))
    drafting.learn(step, walked, None, ["a"], {"a": state_of(2, 4)}, [[4]])
    assert (listener.observed, listener.extended) == (0, 1)
    drafting.learn(step, walked, seen, ["a"], {"a": state_of(2, 4, 4)}, [[4]])
    assert (listener.observed, listener.extended) == (1, 2)


class Reader(Listener):
    """A drafter that keeps the rows it is told about."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[Any]] = []

    def observe(self, rows: Any) -> None:
        self.rows.append([rows.contexts.tolist(), rows.top_ids.tolist(), rows.namespaces.tolist()])


def test_rows_that_are_learnt_later_are_the_same_rows() -> None:
    tree = TokenTree((3, 4, 5), (-1, 0, 0), (0.5,) * 3)
    seen = Candidates(np.arange(32).reshape(4, 8), np.zeros((4, 8), np.float32))
    told = {}
    for later in (False, True):
        reader: Any = Reader()
        drafting = Drafting(reader, trees=True, later=later)
        state = state_of(2, 3, 5, 9)
        drafting.start("a", state_of(2))
        walked = WalkResult([[3, 5, 9]], [[0, 2]], [])
        drafting.learn(step_of(tree), walked, seen, ["a"], {"a": state}, [[3, 5, 9]])
        assert (reader.rows == []) == later  # nothing yet, if later
        assert reader.extended == 1  # tokens are told at once: the next draft needs them
        # The request goes on before the rows are looked at, and ends.
        state.num_tokens = 0
        drafting.stop = lambda request: None  # type: ignore[method-assign]
        drafting.catch_up()
        drafting.catch_up()
        told[later] = reader.rows
    assert told[True] == told[False]
    ((contexts, ids, spaces),) = told[True]
    assert sorted(c for c in contexts if c != [1, 2]) == [[2, 3], [3, 4], [3, 5]]
    assert len(contexts) == len(ids) == len(spaces) == 4


def test_what_was_seen_first_is_learnt_first() -> None:
    reader: Any = Reader()
    drafting = Drafting(reader, trees=True, later=True)
    drafting.start("a", state_of(2))
    for number in (1, 2):
        seen = Candidates(np.full((1, 8), number), np.zeros((1, 8), np.float32))
        output = (2, 4, 4)[: 1 + number]
        walked = WalkResult([[4]], [[]], [])
        step = step_of(TokenTree.EMPTY)
        drafting.learn(step, walked, seen, ["a"], {"a": state_of(*output)}, [[4]])
    drafting.catch_up()
    assert [ids[0][0] for _, ids, _ in reader.rows] == [1, 2]
