# SPDX-License-Identifier: Apache-2.0
"""Ratio rules through vLLM's real Sampler: the law is the target's under its sampling options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.sample.sampler import Sampler

from proposers.chance import Chance, Dice, request_dice
from proposers.law import DraftLaw
from proposers.rsd import grow_constant
from proposers.sampled_tree import LevelwiseGrowth, SampledTree, grow
from proposers.specdec import grow_chain
from proposers.spectr import grow_chains
from proposers.tree import TokenTree
from proposers.verify_block import BlockWalk
from proposers.verify_kseq import kseq
from proposers.verify_swor import swor
from proposers.verify_tree import TreeWalk, Verification
from tests.loading import load_example
from vllm_ext.worker.ratio_walk import ratio_walk
from vllm_ext.worker.walk import stack_logprobs

walk_law = load_example("walk_law")
LENGTH, VOCAB = walk_law.LENGTH, walk_law.VOCAB
exact, law, metadata = walk_law.exact, walk_law.law, walk_law.metadata
p_value, paths_of, table = walk_law.p_value, walk_law.paths_of, walk_law.table

ALPHA = 1e-4  # of each chi-square test; the controls miss it by many orders of magnitude

Table = dict[tuple[int, ...], np.ndarray]
Verifying = Callable[[SampledTree, Chance, int], Verification]
Growing = Callable[[SampledTree, Chance], LevelwiseGrowth]

PLAIN = {"temperature": 1.0}
EVERYTHING = {"temperature": 0.8, "presence_penalty": 0.7, "top_k": 3, "top_p": 0.9}
METHODS: dict[str, tuple[Growing, Verifying]] = {
    "swor": (
        lambda t, c: grow_constant(t, (2, 1), c),
        lambda t, c, rows: TreeWalk(t, swor, c, rows=rows),
    ),
    "kseq": (
        lambda t, c: grow_chains(t, 2, 2, c),
        lambda t, c, rows: TreeWalk(t, kseq, c, rows=rows),
    ),
    "block": (
        lambda t, c: grow_chain(t, 1.0, 3, c),
        lambda t, c, rows: BlockWalk(t, c, rows=rows),
    ),
}


def draft_trees(count: int, growing: Growing, chance: Chance) -> list[SampledTree]:
    """Trees drawn from a draft model of the last token alone, cut to three tokens."""
    logits = np.random.default_rng(9).normal(0, 1.0, (VOCAB + 1, VOCAB))
    laws = [DraftLaw.of(np.argsort(-row)[:3], np.exp(np.sort(-row)[:3] * -1)) for row in logits]
    trees = [SampledTree() for _ in range(count)]
    grow(
        [growing(tree, chance) for tree in trees],
        lambda pairs: [laws[-1 if n < 0 else trees[i].tokens[n]] for i, n in pairs],
    )
    return trees


def walk_all(
    target: Table,
    trees: list[SampledTree],
    verifications: list[Verification | None],
    given: Any,
    rows: int | None = None,
) -> Any:
    scheduled = [tree.token_tree().prefix(len(tree) if rows is None else rows) for tree in trees]
    paths = [path for tree in scheduled for path in paths_of(tree)]
    starts = np.cumsum([0, *[len(tree) + 1 for tree in scheduled[:-1]]]).tolist()
    sampler = Sampler()
    stock = sampler.topk_topp_sampler
    result = ratio_walk(
        sampler,
        torch.from_numpy(np.stack([target.get(path, np.zeros(VOCAB, "f")) for path in paths])),
        given,
        scheduled,
        starts,
        given.output_token_ids,
        lambda _: None,
        verifications=verifications,
    )
    assert sampler.topk_topp_sampler is stock
    assert given.output_token_ids == [[]] * len(trees)
    for tree, tokens, path in zip(scheduled, result.tokens, result.paths, strict=True):
        assert [tree.tokens[node] for node in path] == tokens[:-1]
    return result


def outcomes(target: Table, options: dict[str, float], tokens: list[list[int]]) -> np.ndarray:
    """Counts of the first tokens, completed by the target."""
    dice = Dice(np.random.default_rng(0).random)
    laws = {context: law(logits, context, options) for context, logits in target.items()}
    counts = np.zeros((VOCAB,) * LENGTH)
    for given in tokens:
        text = list(given[:LENGTH])
        while len(text) < LENGTH:
            text.append(dice.draw(laws[tuple(text)]))
        counts[tuple(text)] += 1
    return counts.flatten()


def run(
    name: str,
    options: dict[str, float],
    count: int,
    *,
    rows: int | None = None,
    change: Callable[[SampledTree], None] = lambda tree: None,
) -> float:
    growing, verifying = METHODS[name]
    target = table(1)
    trees = draft_trees(count, growing, Dice(np.random.default_rng(1).random))
    for tree in trees:
        change(tree)
    dice = Dice(np.random.default_rng(2).random)
    verifications = [verifying(t, dice, len(t) if rows is None else rows) for t in trees]
    result = walk_all(target, trees, verifications, metadata(count, options), rows)
    return p_value(outcomes(target, options, result.tokens), exact(target, options))


@pytest.mark.parametrize("options", [PLAIN, EVERYTHING], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_law_is_the_targets(name, options):
    assert run(name, options, 2000) > ALPHA


@pytest.mark.parametrize("name", METHODS)
def test_law_is_the_targets_when_the_scheduler_cuts_the_draft(name):
    assert run(name, PLAIN, 2000, rows=1) > ALPHA


@pytest.mark.parametrize("name", METHODS)
def test_a_wrong_draft_law_is_noticed(name):
    def flatten(tree: SampledTree) -> None:
        for node, drawn_from in tree.laws.items():
            tree.laws[node] = DraftLaw.of(drawn_from.tokens, np.ones(len(drawn_from.tokens)))

    assert run(name, PLAIN, 2000, change=flatten) < ALPHA


def test_greedy_requests_keep_their_tokens_beside_sampled_ones():
    growing, verifying = METHODS["swor"]
    target = table(1)
    trees = draft_trees(6, growing, Dice(np.random.default_rng(1).random))
    dice = Dice(np.random.default_rng(2).random)
    given = metadata(6, PLAIN, all_random=False)
    given.temperature[::2] = 0.0
    result = walk_all(target, trees, [verifying(t, dice, len(t)) for t in trees], given)
    best = [int(target[()].argmax())]
    for tokens in result.tokens[::2]:
        for n, token in enumerate(tokens):
            assert token == int(target[tuple(tokens[:n])].argmax())
        assert tokens[:1] == best
    alone = metadata(6, {"temperature": 0.0})
    again = walk_all(target, trees, [verifying(t, dice, len(t)) for t in trees], alone)
    assert again.tokens[::2] == result.tokens[::2]


@pytest.mark.parametrize("name", METHODS)
def test_a_row_without_a_law_emits_the_samplers_token(name):
    """A target that overflows must not take the engine down."""
    growing, verifying = METHODS[name]
    broken = {context: np.full_like(row, np.nan) for context, row in table(1).items()}
    trees = draft_trees(3, growing, Dice(np.random.default_rng(1).random))
    dice = Dice(np.random.default_rng(2).random)
    given = metadata(3, PLAIN)
    result = walk_all(broken, trees, [verifying(t, dice, len(t)) for t in trees], given)
    assert all(0 <= token < VOCAB for tokens in result.tokens for token in tokens)


def test_requests_without_a_verification_draw_as_ever():
    growing, verifying = METHODS["kseq"]
    target = table(1)
    trees = [SampledTree(), *draft_trees(3, growing, Dice(np.random.default_rng(1).random))]

    def first(with_neighbours: bool) -> tuple[list[int], torch.Tensor]:
        generator = torch.Generator().manual_seed(5)
        count = 4 if with_neighbours else 1
        given = metadata(count, PLAIN, generators={0: generator})
        verifications: list[Verification | None] = [None]
        if with_neighbours:
            verifications += [
                verifying(tree, request_dice(i, 0, 1), len(tree))
                for i, tree in enumerate(trees[1:])
            ]
        result = walk_all(target, trees[:count], verifications, given)
        return result.tokens[0], generator.get_state()

    alone, state = first(False)
    among, state_among = first(True)
    assert alone == among
    assert torch.equal(state, state_among)


def test_a_request_decides_alike_alone_and_in_a_batch():
    target = table(1)
    for growing, verifying in METHODS.values():
        trees = draft_trees(5, growing, Dice(np.random.default_rng(1).random))

        def tokens(which: list[int], trees=trees, verifying=verifying) -> list[list[int]]:
            chosen = [trees[i] for i in which]
            verifications = [
                verifying(trees[i], request_dice(i, 7, 1), len(trees[i])) for i in which
            ]
            return walk_all(target, chosen, verifications, metadata(len(which), PLAIN)).tokens

        assert tokens([0, 1, 2, 3, 4]) == [tokens([i])[0] for i in range(5)]


@pytest.mark.parametrize("name", ["swor", "kseq"])
def test_logprobs_are_those_of_the_emitted_tokens(name):
    growing, verifying = METHODS[name]
    target = table(1)
    trees = draft_trees(8, growing, Dice(np.random.default_rng(1).random))
    dice = Dice(np.random.default_rng(2).random)
    given = metadata(8, PLAIN, max_num_logprobs=0)
    result = walk_all(target, trees, [verifying(t, dice, len(t)) for t in trees], given)
    levels = len(result.logprobs)
    stacked = stack_logprobs(result.logprobs)
    assert max(len(tokens) for tokens in result.tokens) == levels > 1
    for request, tokens in enumerate(result.tokens):
        for level, token in enumerate(tokens):
            row = request * levels + level
            assert int(stacked.logprob_token_ids[row, 0]) == token
            expected = np.log(law(target[tuple(tokens[:level])], (), PLAIN)[token])
            assert float(stacked.logprobs[row, 0]) == pytest.approx(expected, abs=1e-5)


def test_an_error_leaves_the_sampler_as_it_was():
    class Failing:
        node: int | None = -1

        def feed(self, row: Any) -> None:
            raise RuntimeError("broken")

    sampler = Sampler()
    stock = sampler.topk_topp_sampler
    given = metadata(1, PLAIN)
    failing: Any = Failing()
    with pytest.raises(RuntimeError, match="broken"):
        ratio_walk(
            sampler,
            torch.zeros(1, VOCAB),
            given,
            [TokenTree.EMPTY],
            [0],
            given.output_token_ids,
            lambda _: None,
            verifications=[failing],
        )
    assert sampler.topk_topp_sampler is stock
