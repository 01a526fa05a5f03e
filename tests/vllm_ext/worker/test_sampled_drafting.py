# SPDX-License-Identifier: Apache-2.0
"""Drawing trees with a predictor that is a table: which are drawn, from what, and how verified."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats
from vllm import SamplingParams

from proposers.cost_model import CostModel
from proposers.levels import LevelNode
from proposers.sampled_size import AcceptanceByRank, Shape
from proposers.tree import ROOT, TokenTree
from proposers.verify_block import BlockWalk
from proposers.verify_tree import TreeWalk, verify
from tests.shapes import expected_tokens, optimal_template
from vllm_ext.worker.sampled_drafting import Applicant, Draw, Rule, SampledDrafting, draft_law

VOCAB = 6
FREE = CostModel([(1, 1.0)], margin=0.0)
RULES: list[Rule] = ["swor", "kseq", "block"]
DRAWS: list[Draw] = ["beam", "constant", "sequoia", "dyspec"]
WAYS: list[tuple[Rule, Draw]] = [
    *(("swor", draw) for draw in DRAWS),
    ("kseq", "beam"),
    ("block", "beam"),
]


def row(key: tuple[int, ...]) -> Any:
    """A law that depends on the path, likeliest first."""
    weights = np.random.default_rng([7, *key]).random(VOCAB).astype(np.float32)
    ids = np.argsort(-weights)
    return ids, (weights / weights.sum())[ids]


class Table:
    """A predictor that checks that it is asked level by level, and remembers how often."""

    def __init__(self, room: int = 100, unreadable: Sequence[str] = ()) -> None:
        self.passes: list[int] = []
        self.free = room
        self.unreadable = unreadable
        self.asked: dict[str, int] = {}
        self.paths: dict[tuple[str, int], tuple[int, ...]] = {}

    def begin_rows(self, requests: Sequence[str], width: int) -> Any:
        self.passes.append(len(requests))
        self.asked = {}
        self.paths = {(request, ROOT): () for request in requests}
        return {r: row(()) for r in requests if r not in self.unreadable}

    def predict_rows(self, nodes: Sequence[LevelNode], width: int) -> Any:
        self.passes.append(len(nodes))
        for request in {node.request for node in nodes}:
            asked = sum(node.request == request for node in nodes)
            self.asked[request] = self.asked.get(request, 0) + asked
            assert self.asked[request] <= self.free
        for node in nodes:
            above = self.paths[node.request, node.parent]
            self.paths[node.request, node.node] = (*above, node.token)
        return [row(self.paths[node.request, node.node]) for node in nodes]

    def debt(self, request: str) -> int:
        return 3

    def room(self, request: str) -> int:
        return self.free

    def seconds(self, rows: int) -> float:
        return 0.1


def drafting(
    rule: Rule,
    predictor: Any,
    *,
    draw: Draw = "beam",
    adaptive: bool = False,
    depth: int = 4,
    nodes: int = 128,
) -> Any:
    return SampledDrafting(
        rule,
        predictor,
        draw=draw,
        seed=11,
        max_depth=depth,
        max_batch_nodes=nodes,
        adaptive=adaptive,
    )


def applicant(
    request: str, limit: int = 12, *, position: int = 5, chain: bool = False, **params: Any
) -> Applicant:
    given = SamplingParams(**{"temperature": 1.0, "seed": 3, **params})
    return Applicant(request, given, position, limit, chain)


def propose(made: Any, applicants: list[Applicant], cost: Any = FREE, **more: Any) -> Any:
    given = {"base_rows": len(applicants), "base_tokens": float(len(applicants))}
    return made.propose(applicants, cost, **{**given, "most": 1000, **more})


@pytest.mark.parametrize(("rule", "draw"), WAYS)
def test_a_level_of_the_whole_batch_is_one_pass(rule: Rule, draw: Draw) -> None:
    table = Table()
    made = drafting(rule, table, draw=draw)
    trees = propose(made, [applicant(name, 8) for name in "abc"])
    deepest = max(max(tree.depths) for tree in trees.values())
    # With a threshold a level is asked that may turn out to have no children.
    assert 1 < deepest <= len(table.passes) <= deepest + (draw == "dyspec")
    for tree in trees.values():
        tree.validate()
        assert 2 <= len(tree) <= 8
        assert tree.is_chain or rule != "block"


@pytest.mark.parametrize(("rule", "draw"), WAYS)
def test_limits(rule: Rule, draw: Draw) -> None:
    limits = {"one": 1, "three": 3, "many": 40}
    given = [applicant(name, most) for name, most in limits.items()]
    trees = propose(drafting(rule, Table(), draw=draw), [*given, applicant("chain", chain=True)])
    assert all(len(trees[name]) <= most for name, most in limits.items())
    assert trees["chain"].is_chain
    assert len(trees["one"]) == 1
    # Of the slots behind the text, all but those of the last level are written.
    table = Table(room=8)  # which sees to it
    tight = drafting(rule, table, draw=draw)
    tight._size.choose = lambda *_, **__: (Shape(1, 12) if rule == "block" else Shape(3, 4), 1.0)
    assert propose(tight, [applicant("a", 24)])["a"]
    assert 0 < table.asked["a"] <= 8
    # As many nodes as a step has room for, over all requests.
    few = propose(drafting(rule, Table(), draw=draw), [applicant("a"), applicant("b")], most=6)
    assert 2 <= sum(map(len, few.values())) <= 6
    assert not propose(drafting(rule, Table(), draw=draw), [applicant("a")], most=0)
    small = propose(drafting(rule, Table(), draw=draw, nodes=6), [applicant("a"), applicant("b")])
    assert 0 < sum(map(len, small.values())) <= 6


def test_ways_to_draw_a_tree() -> None:
    """Twelve nodes on four levels: three a level, three at the root, or where they are best."""

    def shape(draw: Draw, seed: int = 3) -> Any:
        made = drafting("swor", Table(), draw=draw)
        made._size.choose = lambda *_, **__: (Shape(3, 4), 1.0)
        return propose(made, [applicant("a", 12, seed=seed)])["a"]

    def level_sizes(tree: TokenTree) -> list[int]:
        return [sum(depth == level for depth in tree.depths) for level in (1, 2, 3, 4)]

    beam, constant, sequoia, dyspec = map(shape, DRAWS)
    assert level_sizes(beam) == level_sizes(constant) == [3, 3, 3, 3]
    assert sorted(constant.parents) == sorted([ROOT] * 3 + list(range(9)))
    parents = {draw: {shape(draw, seed).parents for seed in range(12)} for draw in DRAWS}
    assert len(parents["constant"]) == len(parents["sequoia"]) == 1
    assert len(parents["beam"]) > 1
    assert len(parents["dyspec"]) > 1
    assert len(sequoia) == 12
    template = optimal_template(AcceptanceByRank(8).values, 12, 4)
    assert level_sizes(sequoia) == [sum(len(path) == d for path in template) for d in (1, 2, 3, 4)]
    assert level_sizes(sequoia) != level_sizes(beam)
    assert 1 <= len(dyspec) <= 12
    assert all(prob >= 1 / 12 for node, prob in enumerate(dyspec.probs) if node in dyspec.parents)
    chains = {draw: drafting("swor", Table(), draw=draw) for draw in DRAWS}
    drawn = {propose(made, [applicant("a", 4, chain=True)])["a"] for made in chains.values()}
    assert len(drawn) == 1
    assert drawn.pop().is_chain


def test_sequoias_shape_follows_the_measured_acceptance() -> None:
    made = drafting("swor", Table(), draw="sequoia", adaptive=True)
    made._size.choose = lambda *_, **__: (Shape(2, 3), 1.0)
    for _ in range(200):
        made._ranks.learn(2, accepted=True)  # the second of the children, always
    tree = propose(made, [applicant("a", 6)])["a"]
    made._ranks = AcceptanceByRank(8)
    assert tree.parents != propose(made, [applicant("a", 6)])["a"].parents
    first_children = [node for node, parent in enumerate(tree.parents) if parent == ROOT]
    assert [first_children[1] in tree.parents, first_children[0] in tree.parents] == [True, False]


def test_sequoias_table_says_what_a_size_promises() -> None:
    """Ranks that are never accepted promise too little for a tree; the formula knows no ranks."""
    cost = CostModel([(1, 1.0), (9, 1.6)], margin=0.0)
    drawn = {}
    for draw in ("sequoia", "beam"):
        made = drafting("swor", Table(), draw=draw, adaptive=True)
        for _ in range(500):
            made._ranks.learn(8, accepted=False)
        # Chains, which ask the formula, are left out.
        made._size._widths = (2, 4, 8)
        drawn[draw] = propose(made, [applicant("a", 8)], cost)
    assert not drawn["sequoia"]
    assert drawn["beam"]
    made = drafting("swor", Table(), draw="sequoia", adaptive=True)
    tree = propose(made, [applicant("a", 8)], cost)["a"]
    paths = optimal_template(made._ranks.values, len(tree), max(tree.depths))
    promised = expected_tokens(paths, made._ranks.values) - 1.0
    assert made._drawn["a"].promised == pytest.approx(promised)


def test_what_came_true_of_a_promise_is_told() -> None:
    made = drafting("swor", Table(), adaptive=True)
    told: list[tuple[float, int]] = []
    made._size.settle = lambda promised, accepted: told.append((promised, accepted))
    for seed in range(20):
        one = applicant("a", seed=seed)
        tree = propose(made, [one])["a"]
        promised = made._drawn["a"].promised
        walk = made.verification("a", one.params, 5, tree, as_it_goes=False)
        verify(walk, lambda node: np.full(VOCAB, 1 / VOCAB))
        made.learn("a", walk.tokens, walk.path)
        assert told[-1] == (promised, len(walk.path))
        assert promised > 0.0
    assert len({accepted for _, accepted in told}) > 1


def test_what_cannot_be_read_is_left_to_others() -> None:
    made = drafting("swor", Table(unreadable=["b"]))
    trees = propose(made, [applicant("a"), applicant("b")])
    assert list(trees) == ["a"]
    assert made.verification("b", applicant("b").params, 5, TokenTree.EMPTY, as_it_goes=False) is (
        None
    )


def test_draws_depend_on_seed_request_and_position() -> None:
    def tokens(one: Applicant) -> Any:
        return propose(drafting("kseq", Table(), depth=6), [one])["a"].tokens

    assert tokens(applicant("a")) == tokens(applicant("a"))
    drawn = [tokens(applicant("a", seed=s, position=p)) for s in range(4) for p in range(4)]
    assert len(set(drawn)) > 8
    unseeded = tokens(applicant("a", seed=None))
    assert unseeded == tokens(applicant("a", seed=None))
    others = [
        propose(drafting("kseq", Table(), depth=6), [applicant(n, seed=None)])[n].tokens
        for n in "bcdefgh"
    ]
    assert len({*others, unseeded}) > 4


@pytest.mark.parametrize(("rule", "draw"), WAYS)
@pytest.mark.parametrize("rows", [0, 1, None])
def test_first_token_has_the_targets_law_whatever_has_rows(
    rule: Rule, draw: Draw, rows: int | None
) -> None:
    """Also where the scheduler drops nodes for what they are, as a grammar does."""
    target = np.array([0.3, 0.0, 0.25, 0.05, 0.4, 0.0])
    counts: Counter[int] = Counter()
    given = [applicant("a", 4, seed=seed) for seed in range(1500)]
    for one in given:
        made = drafting(rule, Table(), draw=draw, depth=2)
        tree = propose(made, [one])["a"]
        kept = len(tree) if rows is None else rows
        if target[tree.tokens[0]] == 0.0:
            kept = 0
        walk = made.verification("a", one.params, 5, tree.prefix(kept), as_it_goes=False)
        verify(walk, lambda node: target)
        counts[walk.tokens[0]] += 1
        assert len(walk.path) == len(walk.tokens) - 1
        assert all(node < kept for node in walk.path)
    possible = np.flatnonzero(target)
    assert set(counts) <= set(possible.tolist())
    observed = [counts[int(token)] for token in possible]
    assert stats.chisquare(observed, len(given) * target[possible]).pvalue > 1e-3


def test_a_fresh_draw_where_nothing_has_rows_would_be_biased() -> None:
    """Control of the test above: what it would find if such trees were forgotten."""
    target = np.array([0.3, 0.0, 0.25, 0.05, 0.4, 0.0])
    rng = np.random.default_rng(1)
    counts: Counter[int] = Counter()
    for seed in range(1500):
        one = applicant("a", 4, seed=seed)
        made = drafting("block", Table(), depth=2)
        tree = propose(made, [one])["a"]
        if target[tree.tokens[0]] == 0.0:
            counts[int(rng.choice(VOCAB, p=target))] += 1
            continue
        walk = made.verification("a", one.params, 5, tree, as_it_goes=False)
        verify(walk, lambda node: target)
        counts[walk.tokens[0]] += 1
    possible = np.flatnonzero(target)
    observed = [counts[int(token)] for token in possible]
    assert stats.chisquare(observed, 1500 * target[possible]).pvalue < 1e-6


def test_which_verification() -> None:
    one = applicant("a")

    def kind(rule: Rule, as_it_goes: bool) -> type:
        made = drafting(rule, Table())
        tree = propose(made, [one])["a"]
        return type(made.verification("a", one.params, 5, tree, as_it_goes=as_it_goes))

    assert kind("block", False) is BlockWalk
    assert kind("block", True) is TreeWalk
    assert kind("swor", False) is kind("kseq", True) is TreeWalk


def test_trees_of_another_place_are_not_used() -> None:
    made, one = drafting("swor", Table()), applicant("a")
    tree = propose(made, [one])["a"]
    ask = {"as_it_goes": False}
    assert made.verification("a", one.params, 6, tree, **ask) is None
    assert made.verification("b", one.params, 5, tree, **ask) is None
    # Nodes that are not the drawn ones have no rows of ours.
    stranger = TokenTree.chain([VOCAB, VOCAB], [0.0, 0.0])
    walk = made.verification("a", one.params, 5, stranger, **ask)
    verify(walk, lambda node: np.full(VOCAB, 1 / VOCAB))
    assert len(walk.tokens) == 1
    made.stop("a")
    made.stop("a")
    assert made.verification("a", one.params, 5, tree, **ask) is None


def test_drawing_stops_while_it_does_not_pay() -> None:
    slow = CostModel([(1, 1.0), (33, 33.0)])
    table = Table()
    made = drafting("swor", table, adaptive=True)
    trees = [propose(made, [applicant("a")], slow) for _ in range(300)]
    assert not any(trees)
    assert table.passes == []
    assert propose(drafting("swor", Table(), adaptive=True), [applicant("a")], FREE)["a"]


def test_acceptance_is_learned_from_walks() -> None:
    made = drafting("swor", Table(), adaptive=True)
    before = made._size.expected(2, 2)
    for position in range(60):
        one = applicant("a", position=position)
        tree = propose(made, [one], CostModel([(1, 1.0), (64, 1.1)]))["a"]
        walk = made.verification("a", one.params, position, tree, as_it_goes=False)
        never = np.zeros(VOCAB + 1)
        never[VOCAB] = 1.0
        verify(walk, lambda node, law=never: law)
        assert walk.tokens == [VOCAB]
        made.learn("a", walk.tokens, walk.path)
        if made._size.expected(2, 2) < 0.2:
            break
    assert made._size.expected(2, 2) < before / 2


def test_the_law_follows_the_requests_options() -> None:
    ids = np.array([4, 2, 0, 5])
    probs = np.array([0.4, 0.2, 0.1, 0.1], np.float32)

    def law(**options: Any) -> dict[int, float]:
        made = draft_law(ids, probs, SamplingParams(**{"temperature": 1.0, **options}))
        return dict(zip(made.tokens.tolist(), made.probs.round(4).tolist(), strict=True))

    assert law() == {4: 0.5, 2: 0.25, 0: 0.125, 5: 0.125}
    assert law(temperature=0.5) == {4: 0.7273, 2: 0.1818, 0: 0.0455, 5: 0.0455}
    assert law(top_k=2) == {4: 0.6667, 2: 0.3333}
    assert law(top_p=0.6) == {4: 0.6667, 2: 0.3333}
    assert law(top_p=0.1) == {4: 1.0}
    assert law(min_p=0.4) == {4: 0.6667, 2: 0.3333}
    sharp = law(temperature=0.01)
    assert sharp[4] == 1.0
