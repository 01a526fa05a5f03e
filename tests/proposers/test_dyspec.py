# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from heapq import nlargest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proposers import CostModel, DySpecOptions, Mixture, TokenTree
from proposers.dyspec import Growth, grow
from proposers.grower import rate

FLAT = CostModel([(1, 0.03), (1000, 0.03)], margin=0.0)

laws = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(
    lambda w: {token: x / (sum(w) + 1) for token, x in enumerate(w)}
)
tables = st.dictionaries(st.integers(0, 3), laws, min_size=1, max_size=4)


def grown(
    mixture: Mixture,
    starts: list[int],
    options: DySpecOptions,
    cost: CostModel = FLAT,
    *,
    chain: bool = False,
    limits: list[int] | None = None,
) -> list[TokenTree]:
    growths = [
        Growth([start], greedy=True, chain=chain, limit=limit)
        for start, limit in zip(starts, limits or [options.max_nodes] * len(starts), strict=True)
    ]
    n = len(starts)
    return grow(growths, mixture, cost, options, base_rows=n, base_tokens=float(n))


def every_path(mixture: Mixture, start: int, depth: int) -> dict[tuple[int, ...], float]:
    """The value of every path down to a depth, by enumeration."""
    values: dict[tuple[int, ...], float] = {(): 1.0}
    frontier = [()]
    for _ in range(depth):
        frontier = [
            (*path, token)
            for path in frontier
            for token, q in mixture.predict([path[-1] if path else start], True).probs.items()
            if values.setdefault((*path, token), values[path] * q)
        ]
    del values[()]
    return values


def paths(tree: TokenTree) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


@settings(deadline=None)
@given(tables, st.lists(st.integers(0, 3), min_size=1, max_size=3), st.integers(1, 14))
def test_takes_the_best_nodes_of_the_whole_batch(
    table_source, table: dict[int, dict[int, float]], starts: list[int], n: int
) -> None:
    mixture = Mixture([table_source(table)])
    options = DySpecOptions(max_nodes=n, max_batch_nodes=n, max_depth=4, min_prob=1e-6)
    trees = grown(mixture, starts, options)
    everything = [every_path(mixture, start, 4) for start in starts]
    best = nlargest(n, (value for values in everything for value in values.values()))
    got = sorted((p for tree in trees for p in tree.probs), reverse=True)
    assert got == pytest.approx(best)
    for tree, values in zip(trees, everything, strict=True):
        tree.validate()
        assert list(tree.probs) == sorted(tree.probs, reverse=True)
        for path, prob in zip(paths(tree), tree.probs, strict=True):
            assert prob == pytest.approx(values[path])


@settings(deadline=None)
@given(
    tables,
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
    st.floats(0.0001, 0.01),
    st.integers(1, 12),
)
def test_cut_equals_the_best_size_over_all_nodes(
    table_source, table: dict[int, dict[int, float]], starts: list[int], slope: float, jump: int
) -> None:
    mixture = Mixture([table_source(table)])
    n = len(starts)
    cost = CostModel([(1, 0.03), (n + jump, 0.03 + slope), (n + 40, 0.03 + 3 * slope)])
    options = DySpecOptions(max_nodes=40, max_batch_nodes=40, max_depth=4, min_prob=0.001)
    trees = grown(mixture, starts, options, cost)
    values = sorted(
        (v for start in starts for v in every_path(mixture, start, 4).values() if v >= 0.001),
        reverse=True,
    )[:40]
    size = cost.best_size(n, float(n), values)
    got = sorted((p for tree in trees for p in tree.probs), reverse=True)
    rate = (n + sum(values[:size])) / cost.seconds(n + size)
    assert (n + sum(got)) / cost.seconds(n + len(got)) == pytest.approx(rate)


class _DearBranches(CostModel):
    """Seconds by rows, and for each tree with branches."""

    def __init__(self, branching: float) -> None:
        super().__init__([(1, 0.030), (101, 0.130)], margin=0.0)
        self.branching = branching


def tokens_per_second(trees: list[TokenTree], cost: CostModel) -> float:
    return rate(trees, cost, base_rows=len(trees), base_tokens=float(len(trees)))


def test_a_tree_branches_where_that_pays_for_its_attention(table_source) -> None:
    table = {0: {1: 0.5, 2: 0.4}, 1: {3: 0.8}, 2: {3: 0.8}, 3: {0: 0.6}}
    mixture = Mixture([table_source(table)])
    options = DySpecOptions(max_nodes=6, max_batch_nodes=18, max_depth=4)
    branches, rates = [], []
    for branching in (0.0, 0.001, 0.004, 1.0):
        cost = _DearBranches(branching)
        trees = grown(mixture, [0, 0, 3], options, cost)
        branches.append(sum(not tree.is_chain for tree in trees))
        rates.append(tokens_per_second(trees, cost))
        chains = grown(mixture, [0, 0, 3], options, cost, chain=True)
        assert rates[-1] >= tokens_per_second(chains, cost)
    assert branches[0] > 0
    assert branches[-1] == 0
    assert branches == sorted(branches, reverse=True)
    assert rates == sorted(rates, reverse=True)
    # Control: trees that ignore it lose.
    blind = grown(mixture, [0, 0, 3], options, _DearBranches(0.0))
    assert tokens_per_second(blind, _DearBranches(0.02)) < 0.9 * rates[-1]


def test_the_members_of_a_tree_among_what_was_grown() -> None:
    growth = Growth([0], greedy=True, chain=False, limit=8)
    first = growth.add(-1, 5, 0.6)
    other = growth.add(-1, 6, 0.3)
    below = growth.add(first, 5, 0.2)
    growth.add(other, 5, 0.1)
    assert growth.members(growth.tree(3)) == {first, other, below}
    assert growth.members(growth.best_path()) == {first, below}
    assert growth.members(growth.tree(0)) == set()


@settings(deadline=None)
@given(tables, st.integers(0, 3), st.integers(1, 8))
def test_chain_mode_follows_the_best_child(
    table_source, table: dict[int, dict[int, float]], start: int, n: int
) -> None:
    mixture = Mixture([table_source(table)])
    options = DySpecOptions(max_nodes=n, min_prob=1e-6)
    (tree,) = grown(mixture, [start], options, chain=True)
    tree.validate()
    assert tree.is_chain
    last = start
    for token in tree.tokens:
        probs = mixture.predict([last], True).probs
        assert probs[token] == max(probs.values())
        last = token


def test_limits_hold(table_source) -> None:
    table = {t: dict.fromkeys(range(5), 0.2) for t in range(5)}
    mixture = Mixture([table_source(table)])
    small = DySpecOptions(max_nodes=30, max_depth=2, min_prob=0.05)
    (tree,) = grown(mixture, [0], small)
    assert len(tree) == 5  # depth 2 has probability 0.04
    deep = DySpecOptions(max_nodes=30, max_depth=2, min_prob=0.001)
    (tree,) = grown(mixture, [0], deep)
    assert max(tree.depths) == 2
    assert len(tree) == 30
    a, b, c = grown(mixture, [0, 1, 2], deep, limits=[0, 3, 30])
    assert (len(a), len(b), len(c)) == (0, 3, 30)
    trees = grown(mixture, [0] * 8, DySpecOptions(max_batch_nodes=11, min_prob=0.001))
    assert sum(map(len, trees)) == 11


def test_nothing_grows_where_rows_are_dear(table_source) -> None:
    mixture = Mixture([table_source({0: {0: 0.6}})])
    steep = CostModel([(1, 0.03), (2, 0.06), (100, 3.0)])
    assert grown(mixture, [0], DySpecOptions(), steep) == [TokenTree.EMPTY]
    assert len(grown(mixture, [0], DySpecOptions())[0]) > 0


def test_equal_values_grow_in_a_fixed_order(table_source) -> None:
    mixture = Mixture([table_source({0: {9: 0.2, 3: 0.2, 5: 0.2}})])
    (tree,) = grown(mixture, [0], DySpecOptions())
    assert tree.tokens == (3, 5, 9)


@pytest.mark.parametrize(
    "bad", [{"max_nodes": 0}, {"max_depth": 0}, {"min_prob": 0.0}, {"decay": 2.0}]
)
def test_bad_options_are_refused(bad: dict[str, float]) -> None:
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        DySpecOptions(**bad)
