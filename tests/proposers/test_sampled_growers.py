# SPDX-License-Identifier: Apache-2.0
"""Growers of sampled trees: shapes, laws, and one draft forward per level.

That what they grow can be verified exactly is shown in test_verify.py.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from enumeration import Model, Tokens, drafted, law_of, path_of
from scipy.stats import chisquare

from proposers import CostModel
from proposers.chance import Chance, Dice, request_dice
from proposers.dyspec_sampled import grow_heap, grow_threshold
from proposers.grower import Draftee
from proposers.law import DraftLaw
from proposers.rsd import grow_constant, grow_stochastic_beam
from proposers.sampled_tree import LevelwiseGrowth, SampledTree, grow
from proposers.sequoia import OptimalTemplates, grow_template
from proposers.specdec import grow_chain
from proposers.spectr import grow_chains
from proposers.template import Path, StaticTemplate
from proposers.tree import ROOT
from tests.shapes import expected_tokens, optimal_template

VOCAB = 6


def random_model(seed: int = 0, vocab: int = VOCAB) -> Model:
    return Model(lambda rng: rng.dirichlet(np.ones(vocab)), seed)


def dice(seed: int = 0) -> Dice:
    return Dice(np.random.default_rng(seed).random)


class Forwards:
    """A batch's draft model, which notes what each forward computed."""

    def __init__(self, models: Sequence[Model], trees: Sequence[SampledTree]) -> None:
        self.asked: list[list[tuple[int, int]]] = []
        self._models = models
        self._trees = trees

    def __call__(self, pairs: Sequence[tuple[int, int]]) -> list[DraftLaw]:
        self.asked.append(list(pairs))
        return [DraftLaw.dense(self._models[i](path_of(self._trees[i], node))) for i, node in pairs]


GROWERS: dict[str, Callable[[SampledTree, Chance], LevelwiseGrowth]] = {
    "constant": lambda t, c: grow_constant(t, (3, 2, 1), c),
    "beam": lambda t, c: grow_stochastic_beam(t, 4, 3, c),
    "heap": lambda t, c: grow_heap(t, 12, c),
    "threshold": lambda t, c: grow_threshold(t, 0.02, 3, 30, c),
    "template": lambda t, c: grow_template(t, [(0,), (1,), (0, 0), (1, 0), (1, 0, 0)], c),
    "chain": lambda t, c: grow_chain(t, 1.0, 3, c),
    "chains": lambda t, c: grow_chains(t, 4, 3, c),
}


@pytest.mark.parametrize("name", GROWERS)
def test_trees_are_valid_and_a_level_is_one_forward(name):
    trees = [SampledTree() for _ in range(3)]
    forwards = Forwards([random_model(seed) for seed in range(3)], trees)
    grow([GROWERS[name](tree, dice(i)) for i, tree in enumerate(trees)], forwards)
    if name == "heap":
        assert len(forwards.asked) <= 12
    else:
        assert len(forwards.asked) == 3
        assert [tree.token_tree().depths[-1] for tree in trees] == [3, 3, 3]
    for index, tree in enumerate(trees):
        tree.token_tree().validate()
        asked = [node for pairs in forwards.asked for i, node in pairs if i == index]
        assert len(asked) == len(set(asked))
        assert set(asked) == set(tree.laws) == set(tree.draws)
        model = random_model(index)
        for node, law in tree.laws.items():
            np.testing.assert_allclose(law.probs, model(path_of(tree, node)), rtol=1e-12)
        for node, value in enumerate(tree.values):
            path = path_of(tree, node)
            expected = np.prod([model(path[:i])[token] for i, token in enumerate(path)])
            assert value == pytest.approx(expected)
        alone = drafted(model, GROWERS[name], dice(index))
        assert alone.token_tree() == tree.token_tree()  # neighbours change nothing


@pytest.mark.parametrize("name", ["constant", "beam", "heap", "threshold"])
def test_support_that_ends_gives_fewer_children(name):
    one = Model(lambda rng: np.eye(VOCAB)[int(rng.integers(VOCAB))], 0)
    tree = drafted(one, GROWERS[name], dice())
    assert tree.token_tree().is_chain
    assert len(tree) == (12 if name == "heap" else 3)


def test_constant_branching():
    tree = drafted(random_model(), GROWERS["constant"], dice())
    assert Counter(tree.token_tree().depths) == {1: 3, 2: 6, 3: 6}
    assert [len(tree.draws[node]) for node in sorted(tree.draws)] == [3] + 3 * [2] + 6 * [1]


def test_template_shape_and_its_gaps():
    template = [(0,), (1,), (0, 0), (1, 0), (1, 0, 0)]
    tree = drafted(random_model(), lambda t, c: grow_template(t, template, c), dice())
    shape = {}
    for node, children in tree.draws.items():
        for rank, child in enumerate(children):
            shape[child] = (*shape.get(node, ()), rank)
    assert sorted(shape.values()) == sorted(template)
    for gap in ([(1,)], [(0,), (1, 0)]):
        with pytest.raises(ValueError, match="without"):
            drafted(random_model(), lambda t, c, gap=gap: grow_template(t, gap, c), dice())


# Stochastic beam search against its definition: paths in the order of a draw without replacement.


def beam_by_definition(model: Model, width: int) -> dict[tuple[Tokens, ...], float]:
    """Law of (level 1 in order, level 2 in order): of all paths of two tokens, drawn one after the
    other without replacement, the first `width`, and their first `width` distinct beginnings.
    """
    vocab = len(model(()))
    paths = [(a, b) for a in range(vocab) for b in range(vocab)]
    weight = {path: model(())[path[0]] * model(path[:1])[path[1]] for path in paths}
    law: dict[tuple[Tokens, ...], float] = defaultdict(float)

    def go_on(drawn: list[Tokens], p: float, left: float) -> None:
        firsts = list(dict.fromkeys(path[:1] for path in drawn))
        if len(firsts) >= width:
            law[*firsts[:width], *drawn[:width]] += p
            return
        for path in paths:
            if path not in drawn:
                go_on([*drawn, path], p * weight[path] / left, left - weight[path])

    go_on([], 1.0, 1.0)
    return dict(law)


def paths_in_full(outcome: tuple[Tokens, ...]) -> tuple[Tokens, ...]:
    return outcome


def parents_of_paths(outcome: tuple[Tokens, ...]) -> tuple[Tokens, ...]:
    """Level 1 in full; of level 2 only where each path begins, which leaves few outcomes."""
    width = len(outcome) // 2
    return (*outcome[:width], *(path[:1] for path in outcome[width:]))


@pytest.mark.parametrize(("width", "look"), [(2, paths_in_full), (3, parents_of_paths)])
def test_stochastic_beam_draws_paths_without_replacement(width, look):
    model, chance, n = random_model(3, vocab=3), dice(1), 6000
    law: dict[tuple[Tokens, ...], float] = defaultdict(float)
    for outcome, p in beam_by_definition(model, width).items():
        law[look(outcome)] += p
    assert sum(law.values()) == pytest.approx(1.0)
    counts: Counter[tuple[Tokens, ...]] = Counter()
    for _ in range(n):
        tree = drafted(model, lambda t, c: grow_stochastic_beam(t, width, 2, c), chance)
        counts[look(tuple(path_of(tree, node) for node in range(2 * width)))] += 1
    assert set(counts) <= set(law)
    frequent = [outcome for outcome, p in law.items() if n * p >= 5]
    seen = [counts[outcome] for outcome in frequent]
    expected = [n * law[outcome] for outcome in frequent]
    assert len(frequent) > 20
    rest = n - sum(seen), n - sum(expected)
    assert chisquare([*seen, rest[0]], [*expected, rest[1]]).pvalue > 1e-3


# DySpec.


def test_heap_makes_the_most_valuable_draw():
    model = random_model(1)
    tree = drafted(model, GROWERS["heap"], dice(2))
    drawn: dict[int, list[int]] = defaultdict(list)
    for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
        values = {
            at: tree.value(at) * (1.0 - sum(model(path_of(tree, at))[t] for t in drawn[at]))
            for at in range(ROOT, node)
        }
        assert values[parent] == pytest.approx(max(values.values()))
        drawn[parent].append(token)


def test_threshold_makes_every_draw_that_is_worth_it():
    model = random_model(1)
    tree = drafted(model, lambda t, c: grow_threshold(t, 0.05, 3, 100, c), dice(2))
    depths = {ROOT: 0} | dict(enumerate(tree.token_tree().depths))
    for node in range(ROOT, len(tree)):
        if node in tree.draws:
            drawn = [tree.tokens[child] for child in tree.draws[node]]
            law = model(path_of(tree, node))
            left = [tree.value(node) * (1.0 - law[drawn[:n]].sum()) for n in range(len(drawn) + 1)]
            assert min(left[:-1]) >= 0.05
            assert left[-1] < 0.05
        else:
            assert tree.value(node) < 0.05 or depths[node] == 3
    capped = drafted(model, lambda t, c: grow_threshold(t, 0.05, 3, 5, c), dice(2))
    assert len(capped) == 5


# Chains.


def test_chain_stops_after_the_token_that_makes_rejection_likely():
    for seed in range(10):
        tree = drafted(random_model(seed), lambda t, c: grow_chain(t, 0.9, 20, c), dice(seed))
        assert tree.token_tree().is_chain
        assert 1.0 - tree.values[-1] > 0.9
        assert all(1.0 - value <= 0.9 for value in tree.values[:-1])
    assert len(drafted(random_model(), lambda t, c: grow_chain(t, 1.0, 4, c), dice())) == 4


def test_chains_share_their_beginnings():
    model = random_model(5, vocab=3)
    tree = drafted(model, lambda t, c: grow_chains(t, 6, 3, c), dice())
    assert len(tree.draws[ROOT]) == 6
    for node, parent in enumerate(tree.parents):
        reached = tree.draws[parent].count(node)
        if node in tree.draws:
            assert len(tree.draws[node]) == reached
    law = law_of(
        lambda chance: tuple(
            drafted(model, lambda t, c: grow_chains(t, 2, 1, c), chance).draws[ROOT]
        )
    )
    assert law[0, 0] == pytest.approx(float((model(()) ** 2).sum()))


# Sequoia.


def shapes(size: int, ranks: int, depth: int) -> set[frozenset[Path]]:
    """All shapes without gaps."""
    found = {frozenset[Path]()}
    for _ in range(size):
        for shape in list(found):
            for above in [(), *shape]:
                rank = sum(path[:-1] == above for path in shape if path)
                if rank < ranks and len(above) < depth:
                    found.add(shape | {(*above, rank)})
    return {shape for shape in found if len(shape) <= size}


@pytest.mark.parametrize("acceptance", [(0.6, 0.2, 0.1), (0.1, 0.5, 0.3), (0.0, 0.0, 0.7), (0.9,)])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_no_shape_is_better_than_the_optimal_template(acceptance, depth):
    possible = shapes(5, len(acceptance), depth)
    for size in (1, 3, 5):
        template = optimal_template(acceptance, size, depth)
        assert frozenset(template) in possible
        assert len(template) <= size
        best = max(expected_tokens(list(s), acceptance) for s in possible if len(s) <= size)
        assert expected_tokens(template, acceptance) == pytest.approx(best)


def test_one_table_has_every_smaller_shape():
    acceptance = (0.5, 0.2, 0.1)
    table = OptimalTemplates(acceptance, 12, 5)
    for size in range(1, 13):
        for depth in range(1, 6):
            template = optimal_template(acceptance, size, depth)
            assert table.template(size, depth) == template
            accepted = expected_tokens(template, acceptance) - 1.0
            assert table.accepted(size, depth) == pytest.approx(accepted)


def test_optimal_template_of_a_common_size():
    acceptance = (0.6, 0.12, 0.06, 0.04, 0.02, 0.01)
    template = optimal_template(acceptance, 64, 10)
    assert len(template) == 64
    assert max(map(len, template)) <= 10
    # With falling acceptance the best nodes are those with the largest products.
    value = {path: np.prod([acceptance[r] for r in path]) for path in template}
    outside = [
        (*path, rank)
        for path in [(), *template]
        for rank in range(6)
        if (*path, rank) not in value and len(path) < 10
    ]
    assert min(value.values()) >= max(np.prod([acceptance[r] for r in p]) for p in outside) - 1e-12


def test_static_template_grows_the_optimal_shape(table_source):
    template = optimal_template((0.5, 0.2, 0.1), 6, 3)
    source = table_source({token: {1: 0.5, 2: 0.3, 3: 0.1} for token in range(4)})
    source.start("r", [0], greedy=True)
    grower = StaticTemplate(source, template)
    cost = CostModel([(1, 1.0), (64, 1.0001)])
    draftee = Draftee("r", greedy=True, chain=False, limit=64)
    (tree,) = grower.grow([draftee], cost, base_rows=1, base_tokens=1.0)
    assert len(tree) == len(template)


@pytest.mark.parametrize(
    ("acceptance", "size", "depth", "named"),
    [
        ((), 4, 2, "acceptance"),
        ((0.7, 0.7), 4, 2, "acceptance"),
        ((0.5, -0.1), 4, 2, "acceptance"),
        ((float("nan"),), 4, 2, "acceptance"),
        ((0.5,), 0, 2, "size"),
        ((0.5,), 4, 0, "depth"),
    ],
)
def test_impossible_templates_are_refused(acceptance, size, depth, named):
    with pytest.raises(ValueError, match=named):
        optimal_template(acceptance, size, depth)


# Dice.


def test_dice_follow_the_weights():
    chance, n = dice(4), 20000
    weights = np.array([0.0, 3.0, 0.0, 1.0, 4.0, 0.0])
    counts = np.bincount([chance.draw(weights) for _ in range(n)], minlength=6)
    assert counts[weights == 0].sum() == 0
    possible = weights > 0
    assert chisquare(counts[possible], n * weights[possible] / 8).pvalue > 1e-3
    accepted = sum(chance.accept(0.3) for _ in range(n))
    assert chisquare([accepted, n - accepted], [0.3 * n, 0.7 * n]).pvalue > 1e-3


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_dice_never_draw_the_impossible(uniform):
    chance = Dice(lambda: uniform)
    for scale in (1.0, 1.1, 5e-324, 3e300):
        assert chance.draw(np.array([0.0, scale, 0.0])) == 1
    assert not chance.accept(0.0)
    assert chance.accept(1.0)
    assert chance.uniform() == uniform


@pytest.mark.parametrize("weights", [[0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_dice_refuse_what_is_no_law(weights):
    with pytest.raises(ValueError, match="sum"):
        dice().draw(np.array(weights))


def test_request_dice_depend_on_nothing_but_the_place():
    def numbers(*place: int) -> list[float]:
        chance = request_dice(*place)
        return [chance.uniform() for _ in range(4)]

    assert numbers(7, 3, 0) == numbers(7, 3, 0)
    places = [(7, 3, 0), (7, 3, 1), (7, 4, 0), (8, 3, 0), (-1, 3, 0), (2**63, 3, 0)]
    drawn = [x for place in places for x in numbers(*place)]
    assert len(set(drawn)) == len(drawn)  # no two streams share or shift numbers
    assert all(0.0 <= x < 1.0 for x in drawn)
