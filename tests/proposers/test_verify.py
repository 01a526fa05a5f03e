# SPDX-License-Identifier: Apache-2.0
"""Every rule for sampled drafts has exactly the target's law, and breaking its conditions shows.

The bound on total variation is far below anything but rounding; the controls exceed it by eight
orders of magnitude and more.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from enumeration import (
    Growing,
    Model,
    Tokens,
    Verifying,
    bias,
    drafted,
    emitted,
    law_of,
    mean_tokens,
    path_of,
    step_law,
)
from scipy.stats import chisquare, kstest

from proposers.chance import Chance, Dice
from proposers.dyspec_sampled import grow_heap, grow_threshold
from proposers.law import DraftLaw, normalised
from proposers.rsd import grow_constant, grow_stochastic_beam
from proposers.sampled_tree import LevelwiseGrowth, SampledTree
from proposers.sequoia import grow_template
from proposers.specdec import grow_chain
from proposers.spectr import grow_chains
from proposers.tree import ROOT
from proposers.verify_block import BlockWalk
from proposers.verify_kseq import any_accepted, gamma, kseq
from proposers.verify_swor import swor
from proposers.verify_tree import TreeWalk, verify
from tests.shapes import optimal_template

EXACT = 1e-12
NOTICEABLE = 1e-4
WRONG = 0.01


def dirichlet(vocab: int):
    return lambda rng: rng.dirichlet(np.full(vocab, 0.7))


def some_zeros(vocab: int):
    def row(rng: np.random.Generator) -> np.ndarray:
        law = rng.dirichlet(np.full(vocab, 0.7))
        law[rng.permutation(vocab)[: vocab // 2]] = 0.0
        return law / law.sum()

    return row


def one_of(tokens: tuple[int, ...], vocab: int):
    def row(rng: np.random.Generator) -> np.ndarray:
        law = np.zeros(vocab)
        law[list(tokens)] = rng.dirichlet(np.ones(len(tokens)))
        return law

    return row


def best_two(vocab: int):
    def row(rng: np.random.Generator) -> np.ndarray:
        law = rng.dirichlet(np.full(vocab, 0.7))
        law[np.argsort(law)[:-2]] = 0.0
        return law / law.sum()

    return row


PAIRS = {
    "random": (dirichlet, dirichlet, 1),
    "zeros in q": (dirichlet, some_zeros, 1),
    "zeros in p": (some_zeros, dirichlet, 1),
    "zeros in both": (some_zeros, some_zeros, 1),
    "equal": (dirichlet, dirichlet, 0),
    "disjoint": (partial(one_of, (0,)), partial(one_of, (1, 2)), 1),
    "draft cut to its best": (dirichlet, best_two, 1),
    "greedy target": (partial(one_of, (1,)), dirichlet, 1),
}


def models(kind: str, vocab: int, seed: int = 0) -> tuple[Model, Model]:
    target, draft, other = PAIRS[kind]
    return Model(target(vocab), seed), Model(draft(vocab), seed + 100 * other)


def tree_walk(rule) -> Verifying:
    return lambda tree, chance: TreeWalk(tree, rule, chance)


GROWN: dict[str, tuple[int, Growing, Verifying]] = {
    "RSD-C": (3, lambda t, c: grow_constant(t, (2, 2), c), tree_walk(swor)),
    "RSD-C, 3 of 5": (5, lambda t, c: grow_constant(t, (3,), c), tree_walk(swor)),
    "RSD-S": (3, lambda t, c: grow_stochastic_beam(t, 3, 2, c), tree_walk(swor)),
    "DySpec heap": (3, lambda t, c: grow_heap(t, 4, c), tree_walk(swor)),
    "DySpec threshold": (3, lambda t, c: grow_threshold(t, 0.15, 3, 4, c), tree_walk(swor)),
    "Sequoia": (
        3,
        lambda t, c: grow_template(t, optimal_template((0.5, 0.2), 4, 3), c),
        tree_walk(swor),
    ),
    "ratio, chain": (3, lambda t, c: grow_chain(t, 1.0, 3, c), tree_walk(swor)),
    "ratio by k-SEQ, chain": (3, lambda t, c: grow_chain(t, 1.0, 3, c), tree_walk(kseq)),
    "SpecDec++": (3, lambda t, c: grow_chain(t, 0.6, 3, c), tree_walk(swor)),
    "k-SEQ 2x2": (3, lambda t, c: grow_chains(t, 2, 2, c), tree_walk(kseq)),
    "k-SEQ 3x1": (4, lambda t, c: grow_chains(t, 3, 1, c), tree_walk(kseq)),
    "block": (3, lambda t, c: grow_chain(t, 1.0, 3, c), BlockWalk),
    "block, V=5": (5, lambda t, c: grow_chain(t, 1.0, 2, c), BlockWalk),
    "block, SpecDec++": (3, lambda t, c: grow_chain(t, 0.6, 3, c), BlockWalk),
}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("name", GROWN)
def test_emitted_tokens_have_the_targets_law(name, kind):
    vocab, growing, verifying = GROWN[name]
    for seed in range(2 if kind == "random" else 1):
        target, draft = models(kind, vocab, seed)
        law = step_law(target, draft, growing, verifying, seed)
        assert sum(law.values()) == pytest.approx(1.0, abs=EXACT)
        assert bias(law, target, 3) < EXACT


def test_a_greedy_target_gets_its_own_tokens():
    for name, (vocab, growing, verifying) in GROWN.items():
        target, draft = models("greedy target", vocab)
        law = step_law(target, draft, growing, verifying)
        assert all(set(tokens) == {1} for tokens in law), name


# What a scheduler may cut, and what it may not.


def some_rows(growing: Growing, rows) -> tuple[Growing, Verifying]:
    return growing, lambda tree, chance: TreeWalk(tree, swor, chance, rows=rows(tree))


def leading(tree: SampledTree) -> int:
    """Nodes before the first one that is not worth its row, judged by its own token."""
    for node, value in enumerate(tree.values):
        if value < 0.2:
            return node
    return len(tree)


CUTS = {
    "fixed": lambda tree: 1,
    "none": lambda tree: 0,
    "by the nodes' own tokens": leading,
}
CHAIN: Growing = lambda t, c: grow_chain(t, 1.0, 2, c)  # noqa: E731


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ["RSD-C", "RSD-S", "DySpec heap", "k-SEQ 2x2", "block"])
def test_rows_may_be_left_out(name, cut):
    vocab, growing, _ = GROWN[name]
    target, draft = models("random", vocab)

    def program(chance: Chance) -> Tokens:
        tree = drafted(draft, growing, chance)
        rows = CUTS[cut](tree)
        rule = kseq if "k-SEQ" in name else swor
        verification = (
            BlockWalk(tree, chance, rows=rows)
            if name == "block"
            else TreeWalk(tree, rule, chance, rows=rows)
        )
        while verification.node is not None:
            assert verification.node < rows
            verification.feed(target(path_of(tree, verification.node)))
        assert all(node < rows for node in verification.path)
        return tuple(verification.tokens)

    assert bias(law_of(program), target, 3) < EXACT


def test_a_block_asks_for_no_row_behind_an_impossible_token():
    target, draft = models("disjoint", 3)
    chance = Dice(np.random.default_rng(0).random)
    walk = BlockWalk(drafted(draft, CHAIN, chance), chance)
    walk.feed(target(()))
    assert walk.node is None
    assert walk.tokens == [0]


# What breaks the rules' conditions.


def most_probable(growing: Growing) -> Growing:
    """The most probable tokens instead of draws."""

    def grown(tree: SampledTree, chance: Chance) -> LevelwiseGrowth:
        class Top:
            def draw(self, weights: np.ndarray) -> int:
                return int(np.argmax(weights))

        return growing(tree, Top())

    return grown


def prob(tree: SampledTree, node: int) -> float:
    law = tree.laws[tree.parents[node]]
    return float(law.probs[law.place(tree.tokens[node])])


def dropping(growing: Growing) -> Growing:
    """Forgets draws for the tokens that came out."""

    def grown(tree: SampledTree, chance: Chance) -> LevelwiseGrowth:
        yield from growing(tree, chance)
        for node, children in tree.draws.items():
            tree.draws[node] = [c for c in children if prob(tree, c) > 0.3]

    return grown


def best_first(growing: Growing) -> Growing:
    """Sorts siblings by probability."""

    def grown(tree: SampledTree, chance: Chance) -> LevelwiseGrowth:
        yield from growing(tree, chance)
        for children in tree.draws.values():
            children.sort(key=lambda c: -prob(tree, c))

    return grown


def tempered(growing: Growing) -> Growing:
    """Reports the law at another temperature than the draws had."""

    def grown(tree: SampledTree, chance: Chance) -> LevelwiseGrowth:
        yield from growing(tree, chance)
        for node in tree.laws:
            law = tree.laws[node]
            tree.laws[node] = DraftLaw.of(law.tokens, law.probs**0.5)

    return grown


def distinct(growing: Growing) -> Growing:
    """Counts a token that was drawn twice as one draw."""

    def grown(tree: SampledTree, chance: Chance) -> LevelwiseGrowth:
        yield from growing(tree, chance)
        for node, children in tree.draws.items():
            tree.draws[node] = list(dict.fromkeys(children))

    return grown


PAIR: Growing = lambda t, c: grow_constant(t, (2,), c)  # noqa: E731
TWICE: Growing = lambda t, c: grow_chains(t, 2, 1, c)  # noqa: E731
CONTROLS: dict[str, tuple[Growing, Verifying]] = {
    "top-k tokens, SWOR": (most_probable(PAIR), tree_walk(swor)),
    "top-1 chain, block": (most_probable(CHAIN), BlockWalk),
    "draws dropped after the draw, SWOR": (dropping(PAIR), tree_walk(swor)),
    "draws dropped after the draw, k-SEQ": (dropping(TWICE), tree_walk(kseq)),
    "siblings in another order, SWOR": (best_first(PAIR), tree_walk(swor)),
    "draws without replacement, k-SEQ": (PAIR, tree_walk(kseq)),
    "repeated draws counted once, k-SEQ": (distinct(TWICE), tree_walk(kseq)),
    "another temperature, SWOR": (tempered(PAIR), tree_walk(swor)),
    "another temperature, k-SEQ": (tempered(TWICE), tree_walk(kseq)),
    "another temperature, block": (tempered(CHAIN), BlockWalk),
    "rows left out by draws below them": some_rows(CHAIN, lambda tree: int(tree.tokens[1] == 0)),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_the_bound_notices_broken_conditions(name):
    growing, verifying = CONTROLS[name]
    biases = []
    for seed in range(5):
        target, draft = models("random", 3, seed)
        biases.append(bias(step_law(target, draft, growing, verifying, seed), target, 3))
    print(f"{name}: TV {min(biases):.3f} to {max(biases):.3f}")
    assert min(biases) > NOTICEABLE
    assert max(biases) > WRONG


def test_matching_is_exact_for_tokens_that_were_not_drawn():
    growing, _ = CONTROLS["top-k tokens, SWOR"]
    target, draft = models("random", 3)
    verifying = tree_walk(lambda p, q, drawn, chance: chance.draw(p))
    assert bias(step_law(target, draft, growing, verifying), target, 3) < EXACT


# How much is accepted.


def acceptance(rule, growing: Growing, target: Model, draft: Model) -> float:
    """Probability that the first token was drafted."""
    law = step_law(target, draft, growing, tree_walk(rule))
    return sum(p for tokens, p in law.items() if len(tokens) > 1)


def overlap(target: Model, draft: Model) -> float:
    return float(np.minimum(target(()), draft(())).sum())


@pytest.mark.parametrize("rule", [swor, kseq])
def test_one_draw_is_accepted_as_often_as_the_laws_overlap(rule):
    for seed in range(5):
        target, draft = models("random", 4, seed)
        once: Growing = lambda t, c: grow_chain(t, 1.0, 1, c)  # noqa: E731
        expected = pytest.approx(overlap(target, draft), abs=EXACT)
        assert acceptance(rule, once, target, draft) == expected


def test_all_tokens_drawn_means_one_is_accepted():
    for kind in ("random", "zeros in p", "equal"):
        target, draft = models(kind, 4)
        everything: Growing = lambda t, c: grow_constant(t, (4,), c)  # noqa: E731
        assert acceptance(swor, everything, target, draft) == pytest.approx(1.0, abs=EXACT)


def test_more_draws_are_accepted_more_often():
    for seed in range(3):
        target, draft = models("random", 3, seed)
        by_swor, by_kseq = (
            [
                acceptance(rule, lambda t, c, g=growing, k=k: g(t, k, c), target, draft)
                for k in (1, 2, 3)
            ]
            for rule, growing in (
                (swor, lambda t, k, c: grow_constant(t, (k,), c)),
                (kseq, lambda t, k, c: grow_chains(t, k, 1, c)),
            )
        )
        assert by_swor == sorted(by_swor)
        assert by_kseq == sorted(by_kseq)


def test_kseq_accepts_what_its_gamma_promises():
    target, draft = models("random", 5)
    p, q = target(()), draft(())
    for k in (2, 3, 8):
        g = gamma(p, q, k)
        enough, too_little = (
            x * overlap - any_accepted(overlap, k)
            for x in (g, g - 1e-7)
            for overlap in [float(np.minimum(q, p / x).sum())]
        )
        assert enough >= 0.0
        assert too_little < 0.0
    chains: Growing = lambda t, c: grow_chains(t, 2, 1, c)  # noqa: E731
    b = float(np.minimum(q, p / gamma(p, q, 2)).sum())
    # The walk also goes on where the residual names a token that was drafted.
    assert acceptance(kseq, chains, target, draft) >= any_accepted(b, 2)


def test_block_keeps_at_least_what_the_ratio_rule_keeps():
    chain: Growing = lambda t, c: grow_chain(t, 1.0, 3, c)  # noqa: E731
    gains = []
    for seed in range(6):
        target, draft = models("random", 3, seed)
        block = mean_tokens(step_law(target, draft, chain, BlockWalk))
        ratio = mean_tokens(step_law(target, draft, chain, tree_walk(swor)))
        gains.append(block - ratio)
    assert min(gains) > -EXACT
    assert max(gains) > 0.01
    target, draft = models("equal", 3)
    for verifying in (BlockWalk, tree_walk(swor)):
        assert mean_tokens(step_law(target, draft, chain, verifying)) == pytest.approx(4.0)


# The same through real dice.


def p_value(growing: Growing, verifying: Verifying, n: int, seed: int) -> float:
    """Chi-square test of the first two tokens of `n` steps, completed by the target."""
    target, draft = models("random", 3, seed=1)
    drafting, deciding, completing = (
        Dice(np.random.default_rng([seed, stream]).random) for stream in range(3)
    )
    counts = np.zeros((3, 3))
    for _ in range(n):
        tokens = emitted(drafted(draft, growing, drafting), target, verifying, deciding)
        if len(tokens) < 2:
            tokens = (*tokens, completing.draw(target(tokens)))
        counts[tokens[:2]] += 1
    law = np.array([target(())[a] * target((a,)) for a in range(3)])
    return float(chisquare(counts.ravel(), n * law.ravel()).pvalue)


@pytest.mark.parametrize("name", ["RSD-S", "DySpec heap", "k-SEQ 2x2", "block"])
def test_drawn_tokens_have_the_targets_law(name):
    _, growing, verifying = GROWN[name]
    assert p_value(growing, verifying, 3000, seed=0) > 1e-3


def test_the_statistical_test_has_power():
    growing, verifying = CONTROLS["siblings in another order, SWOR"]
    assert p_value(growing, verifying, 3000, seed=0) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RSD-S", "DySpec heap", "k-SEQ 2x2", "block"])
def test_p_values_are_uniform(name):
    """Over many seeds: a small bias would pile the p-values up at 0."""
    _, growing, verifying = GROWN[name]
    values = [p_value(growing, verifying, 5000, seed) for seed in range(100, 125)]
    assert kstest(values, "uniform").pvalue > 1e-3


# Misuse.


def test_tokens_that_cannot_have_been_drawn_are_refused():
    p, q = np.array([0.5, 0.5, 0.0]), DraftLaw.dense(np.array([0.0, 0.5, 0.5]))
    chance = Dice(np.random.default_rng(0).random)
    with pytest.raises(ValueError, match="token 0 has draft probability 0"):
        swor(p, q, [0], chance)
    with pytest.raises(ValueError, match="token 2 appears twice"):
        swor(p, q, [2, 2], chance)
    with pytest.raises(ValueError, match="token 0 has draft probability 0"):
        kseq(p, q, [0], chance)


def test_a_branching_tree_is_no_block():
    _, draft = models("random", 3)
    tree = drafted(draft, PAIR, Dice(np.random.default_rng(0).random))
    with pytest.raises(ValueError, match="branches"):
        BlockWalk(tree, Dice(np.random.default_rng(0).random))


def test_an_ended_walk_takes_no_row():
    dice = Dice(np.random.default_rng(0).random)
    for verification in (TreeWalk(SampledTree(), swor, dice), BlockWalk(SampledTree(), dice)):
        verify(verification, lambda node: np.array([0.0, 1.0]))
        assert verification.tokens == [1]
        assert verification.path == []
        assert verification.node is None
        with pytest.raises(ValueError, match="ended"):
            verification.feed(np.array([0.0, 1.0]))


@pytest.mark.parametrize("row", [[0.0, 0.0], [1.0, -0.5], [np.nan, 1.0], [np.inf, 1.0]])
def test_rows_that_are_no_law_are_refused(row):
    walk = TreeWalk(SampledTree(), swor, Dice(np.random.default_rng(0).random))
    assert walk.node == ROOT
    with pytest.raises(ValueError, match="no law"):
        walk.feed(np.array(row))


def test_laws_that_differ_by_rounding_are_accepted():
    p = normalised(np.random.default_rng(0).random(1000))
    q = DraftLaw.dense((p * 3.0).astype(np.float32))
    dice = Dice(np.random.default_rng(1).random)
    drawn = [dice.draw(q.probs) for _ in range(200)]
    for token in drawn:
        assert swor(p, q, [token], dice) == token
        assert kseq(p, q, [token, token], dice) == token


def test_equal_laws_that_rounding_rejects_still_give_a_token():
    class Refusing(Dice):
        def accept(self, probability: float) -> bool:
            return False

    _, draft = models("equal", 3)
    chance = Refusing(np.random.default_rng(0).random)
    for growing, verifying in (GROWN["block"][1:], GROWN["RSD-C"][1:], GROWN["k-SEQ 2x2"][1:]):
        tokens = emitted(drafted(draft, growing, chance), draft, verifying, chance)
        assert all(0 <= token < 3 for token in tokens)


def test_every_decision_is_a_branch():
    law = law_of(lambda chance: (chance.accept(0.25), chance.draw(np.array([1.0, 0.0, 3.0]))))
    assert law == {(False, 0): 0.1875, (False, 2): 0.5625, (True, 0): 0.0625, (True, 2): 0.1875}
