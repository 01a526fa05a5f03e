# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proposers import CostModel, DySpecOptions, TokenTree, TreeDrafter, VerifiedRows
from proposers.dyspec import DySpec
from proposers.gate import Gate
from proposers.mixture import Mixture
from proposers.suffix import SuffixSource

FLAT = [(1, 0.03), (1000, 0.0301)]
VOCAB = 50


def drafter(**options: float) -> TreeDrafter:
    return TreeDrafter(VOCAB, DySpecOptions(**options), CostModel(FLAT))


def rows(contexts: list[tuple[int, int]], top: list[dict[int, float]]) -> VerifiedRows:
    return VerifiedRows(
        np.array(contexts, np.int64).reshape(-1, 2),
        np.array([list(t) for t in top], np.int64).reshape(len(top), len(top[0]) if top else 0),
        np.array([list(t.values()) for t in top], np.float32).reshape(len(top), -1 if top else 0),
        np.zeros(len(top), np.int64),
    )


def test_drafts_what_the_target_has_shown() -> None:
    d = drafter()
    d.start("r", [1, 2], greedy=True)
    assert d.propose(["r"]) == [TokenTree.EMPTY]
    d.observe(rows([(1, 2), (2, 3)], [{3: 0.9, 7: 0.05}, {4: 0.9, 8: 0.05}]))
    (tree,) = d.propose(["r"])
    assert tree.tokens[:2] == (3, 4)
    assert tree.parents[:2] == (-1, 0)
    d.extend("r", [3])
    (tree,) = d.propose(["r"])
    assert tree.tokens[0] == 4


def test_drafts_repeated_text() -> None:
    d = drafter()
    d.start("r", [*range(10, 20), 1, 2, *range(10, 15)], greedy=True)
    (tree,) = d.propose(["r"])
    assert tree.tokens[:4] == (15, 16, 17, 18)
    assert tree.prefix(4).is_chain


def test_feedback_reaches_every_visited_node(table_source) -> None:
    """A draft that is always accepted grows; one that never is withers."""
    table = {t: {t + 1: 1.0} for t in range(40)}
    for answer, compare in (([1, 2, 3, 4], np.greater), ([30], np.less)):
        d = TreeDrafter(
            VOCAB, DySpecOptions(max_nodes=4), CostModel(FLAT), [table_source(table, odds=1.0)]
        )
        d.start("r", [0], greedy=True)
        first = d.propose(["r"])[0]
        for _ in range(50):
            d.propose(["r"])
            d.extend("r", answer)
            d.start("r", [0], greedy=True)
        last = d.propose(["r"])[0]
        assert compare(sum(last.probs), sum(first.probs))
    assert sum(last.probs) < 0.2


def test_without_feedback_nothing_changes(table_source) -> None:
    """Negative control of the test above."""
    d = TreeDrafter(VOCAB, DySpecOptions(), CostModel(FLAT), [table_source({0: {1: 1.0}}, 1.0)])
    d.start("r", [0], greedy=True)
    first = d.propose(["r"])
    for _ in range(50):
        d.start("r", [0], greedy=True)
        d.extend("r", [30])  # no proposal since the start: nothing to compare with
    d.start("r", [0], greedy=True)
    assert d.propose(["r"]) == first


def test_a_proposal_is_compared_once(table_source) -> None:
    trees = []
    for steps in ([[0]], [[0], [0], [0]], [[0, 0]]):
        d = TreeDrafter(VOCAB, DySpecOptions(), CostModel(FLAT), [table_source({0: {1: 1.0}}, 1.0)])
        d.start("r", [0], greedy=True)
        for _ in range(3):
            d.propose(["r"])
            for tokens in steps:
                d.extend("r", tokens)
        trees.append(d.propose(["r"])[0])
    assert trees[0] == trees[1] == trees[2]
    assert 0 < trees[0].probs[0] < 0.45


def test_limits_chain_and_other_rows() -> None:
    d = drafter(max_nodes=6)
    for name in "abc":
        d.start(name, [1, 2], greedy=True, chain=name == "c")
    d.observe(
        rows([(1, 2), (2, 3), (2, 4)], [{3: 0.6, 4: 0.3}, {5: 0.9, 6: 0.1}, {5: 0.9, 6: 0.1}])
    )
    a, b, c = d.propose(["a", "b", "c"], max_nodes=[100, 1, 5])
    assert 2 < len(a) <= 6
    assert len(b) == 1
    assert c.is_chain
    assert not a.is_chain
    steep = TreeDrafter(VOCAB, DySpecOptions(), CostModel([(1, 0.03), (10, 0.031), (11, 1.0)]))
    steep.start("r", [1, 2], greedy=True)
    steep.observe(rows([(1, 2), (2, 3)], [{3: 0.9}, {5: 0.9}]))
    assert len(steep.propose(["r"])[0]) > 0
    assert steep.propose(["r"], other_rows=9) == [TokenTree.EMPTY]
    assert steep.propose([]) == []


def test_a_step_without_room_says_nothing_about_drafting(table_source) -> None:
    gate = Gate()
    source = table_source({0: {1: 0.9}, 1: {0: 0.9}})
    d = TreeDrafter(VOCAB, DySpecOptions(), CostModel(FLAT), [source], gate=gate)
    d.start("r", [0], greedy=True)
    d.start("s", [0], greedy=True)
    for _ in range(100):
        assert d.propose(["r", "s"], most=0) == [TokenTree.EMPTY] * 2
    assert gate.is_open
    assert sum(map(len, d.propose(["r", "s"], most=3))) == 3
    assert sum(map(len, d.propose(["r", "s"]))) > 3


def test_it_drafts_unless_nobody_wants_it_or_the_gate_is_closed() -> None:
    gate = Gate()
    drafter = TreeDrafter(VOCAB, DySpecOptions(), CostModel(FLAT), gate=gate)
    drafter.start("a", [1, 2, 1, 2, 1], greedy=True)
    assert drafter.drafts
    assert drafter.propose(["a"], max_nodes=[0]) == [TokenTree.EMPTY]
    assert not drafter.drafts
    assert len(drafter.propose(["a"])[0]) > 0
    assert drafter.drafts
    gate.is_open = False
    assert not drafter.drafts


def test_the_gate_is_asked_once_per_step() -> None:
    class Counting(Gate):
        asked = 0

        def wants_draft(self, base_rows: int, measured: float | None = None) -> bool:
            self.asked += 1
            assert (measured is not None) == self.is_open
            return super().wants_draft(base_rows, measured)

    gate = Counting()
    d = TreeDrafter(VOCAB, DySpecOptions(), CostModel(FLAT), gate=gate)
    d.start("a", [1, 2, 1, 2, 1], greedy=True)
    assert not d.rests(1)
    assert gate.asked == 1
    assert len(d.propose(["a"], asked=True)[0]) > 0
    assert gate.asked == 1
    d.propose(["a"])
    assert gate.asked == 2
    gate.is_open = False
    assert d.rests(1)
    assert d.propose(["a"]) == [TokenTree.EMPTY]
    assert not d.rests(0)  # no request, no question
    assert gate.asked == 4
    assert not TreeDrafter(VOCAB, DySpecOptions(), CostModel(FLAT)).rests(1)  # without a gate


def test_namespaces_do_not_share_tables() -> None:
    d = drafter()
    d.start("base", [1, 2], greedy=True)
    d.start("lora", [1, 2], greedy=True, namespace=5)
    d.observe(rows([(1, 2)], [{3: 0.9}]))
    base, lora = d.propose(["base", "lora"])
    assert base.tokens == (3,)
    assert lora == TokenTree.EMPTY


class _Heard:
    """Wraps a source and writes down what it is told."""

    def __init__(self, source) -> None:
        self.source = source
        self.told: list[tuple[str, ...]] = []

    def __getattr__(self, name: str):
        return getattr(self.source, name)

    def extend(self, request: str, tokens: list[int]) -> None:
        self.told.append((request, *tokens))
        self.source.extend(request, tokens)


def test_sources_hear_of_tokens_when_somebody_drafts(table_source) -> None:
    heard = _Heard(table_source({3: {4: 1.0}}))
    d = TreeDrafter(VOCAB, DySpecOptions(), CostModel(FLAT), [heard])
    d.start("r", [1], greedy=True)
    d.start("s", [1], greedy=True)
    for tokens in ([2], [3]):
        d.extend("r", tokens)
        d.extend("s", tokens)
        assert d.propose(["r", "s"], max_nodes=[0, 0]) == [TokenTree.EMPTY] * 2
    assert heard.told == []
    assert [tree.tokens for tree in d.propose(["r"])] == [(4,)]
    assert heard.told == [("r", 2, 3)]
    d.stop("s")  # what it has said may serve others
    assert heard.told == [("r", 2, 3), ("s", 2, 3)]


def test_unknown_requests_are_named() -> None:
    d = drafter()
    d.stop("r")
    with pytest.raises(KeyError, match="'r' is unknown"):
        d.extend("r", [1])
    with pytest.raises(KeyError, match="'r' is unknown"):
        d.propose(["r"])
    with pytest.raises(ValueError, match="vocab_size=0"):
        TreeDrafter(0, DySpecOptions(), CostModel(FLAT))


wild = st.integers(-3, VOCAB + 3)
events = st.lists(
    st.tuples(
        st.lists(
            st.tuples(st.tuples(wild, wild), st.lists(wild, min_size=3, max_size=3, unique=True)),
            max_size=8,
        ),
        st.lists(wild, max_size=4),
        st.lists(wild, max_size=4),
    ),
    max_size=6,
)


def play(prompts: list[list[int]], history: list, check: bool) -> list[list[TokenTree]]:
    d = drafter(min_prob=0.001)
    names = [str(i) for i in range(len(prompts))]
    for i, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        d.start(name, prompt, greedy=i % 2 == 0, chain=i == 2)
    trees = []
    for seen, *emitted in history:
        contexts = [context for context, _ in seen]
        d.observe(rows(contexts, [dict(zip(top, (0.5, 0.3, 0.1), strict=True)) for _, top in seen]))
        for name, tokens in zip(names, emitted, strict=False):
            d.extend(name, tokens)
        trees.append(d.propose(names))
        if check:
            for tree in trees[-1]:
                tree.validate()
                assert all(0 <= token < VOCAB for token in tree.tokens)
                assert len(tree) <= 32
                for n in range(len(tree)):
                    tree.prefix(n).validate()
    return trees


@settings(deadline=None)
@given(st.lists(st.lists(wild, max_size=12), min_size=3, max_size=3), events)
def test_any_input_gives_valid_and_repeatable_trees(
    prompts: list[list[int]], history: list
) -> None:
    assert play(prompts, history, check=True) == play(prompts, history, check=False)


def test_growers_are_told_how_much_a_request_may_still_get() -> None:
    told: list[int] = []

    class Asking(DySpec):
        def grow(self, draftees: Any, *args: Any, **kwargs: Any) -> Any:
            told.extend(draftee.left for draftee in draftees)
            return super().grow(draftees, *args, **kwargs)

    grower = Asking(Mixture([SuffixSource(VOCAB)]), DySpecOptions())
    d = TreeDrafter(VOCAB, DySpecOptions(), CostModel(FLAT), grower=grower)
    d.start("r", [1, 2, 3], greedy=True, longest=10)
    d.start("endless", [1, 2, 3], greedy=True)
    d.propose(["r"])
    d.extend("r", [4, 5])
    d.propose(["r"])
    d.propose(["endless"])
    assert told[:2] == [7, 5]
    assert told[2] > 10**6
