# SPDX-License-Identifier: Apache-2.0
"""The growers beside DySpec: Token Recycling's template, ADED's search, RASD's fusion."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proposers import BigramRecycling, CostModel, DySpecOptions, Mixture, TokenTree, VerifiedRows
from proposers.dyspec import DySpec
from proposers.grower import Draftee, cut, ordered
from proposers.puct import Puct
from proposers.rasd import Rasd, fuse
from proposers.template import PAPER, StaticTemplate

FREE = CostModel([(1, 0.03), (1000, 0.03)], margin=0.0)
LIMITS = DySpecOptions(max_nodes=24, max_batch_nodes=500, min_prob=1e-4, max_depth=6)

laws = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(
    lambda w: {token: x / (sum(w) + 1) for token, x in enumerate(w)}
)
tables = st.dictionaries(st.integers(0, 3), laws, min_size=1, max_size=4)


def draftee(request: str = "r", limit: int = 24, *, chain: bool = False) -> Draftee:
    return Draftee(request, greedy=True, chain=chain, limit=limit)


def grow(
    grower, *draftees: Draftee, cost: CostModel = FREE, most: int | None = None
) -> list[TokenTree]:
    n = len(draftees)
    return grower.grow(draftees, cost, base_rows=n, base_tokens=float(n), most=most)


def paths(tree: TokenTree) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def started(source, token: int):
    for name in ("r", "s"):
        source.start(name, [token], greedy=True)
    return source


def rasd_of(draft: Mixture, retrieval: Mixture, *, top_k: int) -> Rasd:
    return Rasd(DySpec(draft, LIMITS), DySpec(retrieval, LIMITS), LIMITS, top_k=top_k)


def growers(table_source, table, other) -> dict[str, object]:
    def make(content):
        return started(table_source(content), 0)

    return {
        "template": StaticTemplate(make(table)),
        "puct": Puct(Mixture([make(table)]), LIMITS, iterations=40),
        "rasd": rasd_of(Mixture([make(table)]), Mixture([make(other)]), top_k=2),
    }


@settings(deadline=None, max_examples=40)
@given(tables, tables, st.integers(0, 12), st.booleans())
def test_any_tables_give_valid_trees_within_the_limit(
    table_source, table, other, limit: int, chain: bool
) -> None:
    for grower in growers(table_source, table, other).values():
        for _ in range(3):
            trees = grow(grower, draftee(limit=limit, chain=chain), draftee("s", 5))
            for tree, most in zip(trees, (limit, 5), strict=True):
                tree.validate()
                assert len(tree) <= most
            assert not chain or trees[0].is_chain
            grower.learn("r", [0, 1])
        grower.stop("r")
        grower.stop("unknown")


@pytest.mark.parametrize("most", [0, 1, 5, 1000])
def test_a_step_with_little_room_has_few_nodes(table_source, most: int) -> None:
    table = {token: {0: 0.4, 1: 0.3, 2: 0.2} for token in range(3)}
    made = growers(table_source, table, table)
    made["dyspec"] = DySpec(Mixture([started(table_source(table), 0)]), LIMITS)
    for grower in made.values():
        free = grow(grower, draftee(), draftee("s"))
        trees = grow(grower, draftee(), draftee("s"), most=most)
        nodes = sum(map(len, trees))
        assert nodes == min(most, sum(map(len, free)))
        for tree in trees:
            tree.validate()
    assert sum(map(len, free)) > 5  # control: there was more to draft


def test_every_grower_stops_where_rows_do_not_pay(table_source) -> None:
    table = {0: {1: 0.9}, 1: {2: 0.9}, 2: {0: 0.9}}
    steep = CostModel([(1, 0.03), (2, 1.0), (3, 2.0)])
    for grower in growers(table_source, table, table).values():
        assert grow(grower, draftee(), cost=steep) == [TokenTree.EMPTY]
        assert len(grow(grower, draftee())[0]) > 2


def test_growers_keep_the_best_nodes_of_the_batch() -> None:
    a = TokenTree((1, 2, 3), (-1, 0, 1), (0.9, 0.5, 0.1))
    b = TokenTree((4, 5), (-1, -1), (0.6, 0.3))
    kept = cut([a, b], FREE, base_rows=2, base_tokens=2.0, most=3)
    assert kept == [a.prefix(2), b.prefix(1)]
    step = CostModel([(2, 0.03), (4, 0.0301), (5, 1.0)])
    assert cut([a, b], step, base_rows=2, base_tokens=2.0, most=9) == [a.prefix(1), b.prefix(1)]


def test_ordered_puts_parents_first_even_on_ties() -> None:
    tree = ordered([7, 8, 9], [-1, 0, -1], [0.5, 0.5, 0.5], 2)
    assert tree == TokenTree((7, 8), (-1, 0), (0.5, 0.5))


# -- Token Recycling's template -------------------------------------------------------------------


def test_the_template_is_the_papers() -> None:
    assert len(PAPER) == len(set(PAPER)) == 80
    assert sorted(Counter(map(len, PAPER)).items()) == [
        (1, 8), (2, 21), (3, 25), (4, 15), (5, 8), (6, 3),
    ]  # fmt: skip
    for i, path in enumerate(PAPER):
        assert len(path) == 1 or path[:-1] in PAPER[:i]
        assert all(0 <= rank < 8 for rank in path)


def test_a_full_table_fills_the_template() -> None:
    table = BigramRecycling(100, decay=1.0, negligible=0.0)
    table.start("r", [0], greedy=True)
    everything = VerifiedRows(
        np.stack([np.full(100, -1), np.arange(100)], 1),
        (np.arange(100)[:, None] * 8 + np.arange(8)) % 97,
        np.tile(np.linspace(0.2, 0.001, 8, dtype=np.float32), (100, 1)),
        np.zeros(100, np.int64),
    )
    table.observe(everything)
    (tree,) = grow(StaticTemplate(table), draftee(limit=127))
    assert len(tree) == 80
    token_at = {(): 0}
    for path in PAPER:
        token_at[path] = (token_at[path[:-1]] * 8 + path[-1]) % 97
    tokens_of = lambda path: tuple(token_at[path[: i + 1]] for i in range(len(path)))  # noqa: E731
    assert sorted(paths(tree)) == sorted(map(tokens_of, PAPER))


def test_the_template_learns_which_ranks_are_accepted(table_source) -> None:
    """The second rank is always right here: it must come to be drafted first."""
    table = {t: {(t + 1) % 5: 0.6, (t + 2) % 5: 0.3} for t in range(5)}
    grower = StaticTemplate(started(table_source(table), 0))
    before = grow(grower, draftee(limit=1))[0].tokens
    for _ in range(60):
        grow(grower, draftee())
        grower.learn("r", [2, 4])
    assert before == (1,)
    assert grow(grower, draftee(limit=1))[0].tokens == (2,)
    grower.learn("unknown", [1])


def test_a_row_that_is_written_twice_keeps_the_accepted_one() -> None:
    tables = []
    for order in ((0, 1), (1, 0)):
        table = BigramRecycling(50, decay=1.0)
        table.start("r", [3], greedy=True)
        rows = VerifiedRows(
            np.array([[1, 3], [2, 3]], np.int64)[list(order)],
            np.array([[10, 11], [20, 21]], np.int64)[list(order)],
            np.array([[0.9, 0.05], [0.8, 0.1]], np.float32)[list(order)],
            np.zeros(2, np.int64),
        )
        table.observe(rows)
        tables.append(table.candidates(table.root("r"))[1])
    assert set(tables[0]) == {20, 21}  # the later row
    assert set(tables[1]) == {10, 11}


# -- ADED -----------------------------------------------------------------------------------------


def test_the_search_visits_what_is_probable(table_source) -> None:
    table = {0: {1: 0.7, 2: 0.2, 3: 0.05}, 1: {4: 0.9}, 4: {5: 0.8}, 2: {6: 0.5}}
    mixture = Mixture([started(table_source(table), 0)])
    (tree,) = grow(Puct(mixture, LIMITS, iterations=60), draftee(limit=4))
    assert paths(tree)[:3] == [(1,), (1, 4), (1, 4, 5)]


def test_more_iterations_find_more(table_source) -> None:
    table = {t: {(t * 3 + k) % 50: 0.2 for k in range(4)} for t in range(50)}
    sizes = []
    for iterations in (1, 5, 50):
        mixture = Mixture([started(table_source(table), 0)])
        (tree,) = grow(Puct(mixture, LIMITS, iterations=iterations), draftee(limit=100))
        sizes.append(len(tree))
    assert sizes == sorted(set(sizes))


# -- RASD -----------------------------------------------------------------------------------------


def rasd(table_source, draft, retrieval, top_k: int) -> Rasd:
    def mixture(table):
        return Mixture([started(table_source(table), 0)])

    return rasd_of(mixture(draft), mixture(retrieval), top_k=top_k)


def test_retrieval_is_pruned_by_the_drafts_top_k(table_source) -> None:
    draft = {0: {1: 0.6, 2: 0.3}}
    retrieval = {0: {2: 0.5, 9: 0.5}, 2: {3: 1.0}, 9: {8: 1.0}}
    (tree,) = grow(rasd(table_source, draft, retrieval, top_k=2), draftee())
    assert set(paths(tree)) == {(1,), (2,), (2, 3)}
    (tree,) = grow(rasd(table_source, draft, retrieval, top_k=1), draftee())
    assert set(paths(tree)) == {(1,), (2,)}
    # Without a draft there is nothing to prune by.
    (tree,) = grow(rasd(table_source, {}, retrieval, top_k=1), draftee())
    assert set(paths(tree)) == {(2,), (2, 3), (9,), (9, 8)}


def test_what_was_pruned_is_learnt_from_all_the_same(table_source) -> None:
    grower = rasd(table_source, {0: {1: 0.9}}, {0: {9: 1.0}}, top_k=1)
    for _ in range(200):
        grow(grower, draftee())
        grower.learn("r", [9])
    mixture = grower._retrieval.mixture
    prediction = mixture.predict(mixture.root("r"), greedy=True)
    assert prediction.probs[9] > 0.9


def test_fusion_follows_the_longest_prefix() -> None:
    drafted = TokenTree((1, 2, 5), (-1, 0, -1), (0.6, 0.4, 0.2))
    retrieved = TokenTree((1, 2, 3, 7), (-1, 0, 1, -1), (0.7, 0.5, 0.45, 0.1))
    tree = fuse(drafted, retrieved, 10, chain=False)
    tree.validate()
    assert dict(zip(paths(tree), tree.probs, strict=True)) == {
        (1,): 0.7, (1, 2): 0.5, (1, 2, 3): 0.45, (5,): 0.2, (7,): 0.1,
    }  # fmt: skip
    assert len(fuse(drafted, retrieved, 2, chain=False)) == 2


def test_of_two_chains_the_better_one_is_kept() -> None:
    short, long = TokenTree.chain([1], [0.9]), TokenTree.chain([2, 3, 4], [0.5, 0.4, 0.3])
    assert fuse(short, long, 10, chain=True) == long
    assert fuse(short, long, 1, chain=True) == short


def test_growers_without_cost_are_as_good_as_dyspec_on_one_source(table_source) -> None:
    """With rows free and a limit, PUCT keeps nearly the mass that DySpec's greedy growth keeps."""
    rng = np.random.default_rng(0)
    table = {
        t: dict(zip(rng.permutation(30)[:5].tolist(), (rng.dirichlet(np.ones(6))[:5]), strict=True))
        for t in range(30)
    }
    table = {t: {k: float(p) for k, p in law.items()} for t, law in table.items()}
    mass = []
    for make in (lambda m: DySpec(m, LIMITS), lambda m: Puct(m, LIMITS, iterations=400)):
        (tree,) = grow(make(Mixture([started(table_source(table), 0)])), draftee(limit=8))
        mass.append(sum(tree.probs))
    assert mass[1] <= mass[0] + 1e-9
    assert mass[1] == pytest.approx(mass[0], rel=0.25)
