# SPDX-License-Identifier: Apache-2.0
"""Sizes of drawn trees: chosen by what they promise, learned from what they brought."""

from __future__ import annotations

import random
from typing import Any

import pytest

from proposers.cost_model import CostModel
from proposers.sampled_size import NO_TREE, AcceptanceByRank, Shape, SizeByExpectation

WIDTHS = (1, 2, 3, 4, 6, 8)
FREE = CostModel([(1, 1.0)], margin=0.0)
PER_ROW = CostModel([(1, 1.0), (65, 65.0)], margin=0.0)


def choose(chooser: SizeByExpectation, cost: CostModel, a_pass: float, **more: Any) -> Any:
    given = {"base_rows": 1, "base_tokens": 1.0, "requests": 1, "size": 24, "debt": 1, **more}
    return chooser.choose(cost, lambda rows: a_pass, **given)


def learn(size: SizeByExpectation, accepted: bool, times: int) -> None:
    for _ in range(times):
        size.learn(1, accepted, width=1, level=0, draws=1)


def test_free_trees_are_as_large_as_allowed() -> None:
    size = SizeByExpectation(WIDTHS, 12)
    for most in (1, 5, 24, 64):
        shape, gain = choose(size, FREE, 0.0, size=most)
        assert most / 2 < shape.width * shape.depth <= most
        assert shape.depth <= 12
        assert gain == pytest.approx(size.expected(shape.width, shape.depth))


def test_no_tree_where_rows_or_passes_cost_too_much() -> None:
    size = SizeByExpectation(WIDTHS, 12)
    assert choose(size, PER_ROW, 0.0) == (NO_TREE, 0.0)
    assert choose(size, FREE, 10.0) == (NO_TREE, 0.0)
    assert choose(size, FREE, 0.0, size=0) == (NO_TREE, 0.0)


def test_passes_that_cost_more_make_trees_shallower() -> None:
    size = SizeByExpectation(WIDTHS, 12)
    depths = [choose(size, FREE, a_pass)[0].depth for a_pass in (0.0, 0.05, 0.2, 0.5)]
    assert depths == sorted(depths, reverse=True)
    assert depths[-1] < depths[0]


def test_what_must_be_read_first_counts() -> None:
    size = SizeByExpectation((1,), 4)
    given: dict[str, Any] = {"base_rows": 1, "base_tokens": 1.0, "requests": 1, "size": 4}
    by_row = [size.choose(FREE, lambda rows: 0.01 * rows, debt=d, **given)[1] for d in (1, 16)]
    assert by_row[0] > by_row[1] > 0.0


def test_the_gain_is_that_of_the_formula() -> None:
    size = SizeByExpectation((2,), 1)
    # Two draws of which one is accepted with 1 - 0.3^2, for 2 + 1 rows and one pass.
    cost = CostModel([(1, 1.0), (3, 1.2)], margin=0.0)
    shape, gain = choose(size, cost, 0.1)
    assert shape == Shape(2, 1)
    assert gain == pytest.approx((1.0 + 0.91) / (1.2 + 0.1) - 1.0)


def test_rejections_end_drafting_and_a_pause_ends_in_another_try() -> None:
    size = SizeByExpectation((1,), 4)
    cost = CostModel([(1, 1.0), (5, 1.8)], margin=0.0)
    assert choose(size, cost, 0.1)[0] != NO_TREE
    learn(size, False, 200)
    assert choose(size, cost, 0.1)[0] == NO_TREE
    for waited in range(2000):
        size.forget()
        if choose(size, cost, 0.1)[0] != NO_TREE:
            assert waited > 10
            return
    raise AssertionError("never tried again")


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
def test_acceptance_is_learned_by_draw(rate: float) -> None:
    """Four draws are tried in turn until one is accepted."""
    size = SizeByExpectation((1, 4), 1)
    dice = random.Random(1)
    for _ in range(3000):
        tried = next((i for i in range(1, 5) if dice.random() < rate), None)
        size.learn(tried or 4, tried is not None, width=4, level=0, draws=4)
    assert size.expected(1, 1) == pytest.approx(rate, abs=0.03)
    assert size.expected(4, 1) == pytest.approx(1 - (1 - rate) ** 4, abs=0.03)
    assert SizeByExpectation((1, 4), 1).expected(1, 1) == pytest.approx(0.7)  # before


def test_draws_below_the_accepted_node_are_learned() -> None:
    lean, rich = SizeByExpectation((4,), 4), SizeByExpectation((4,), 4)
    for _ in range(200):
        lean.learn(1, True, width=4, level=1, draws=1)
        rich.learn(1, True, width=4, level=1, draws=4)
        # The root has all draws and says nothing about the share.
        lean.learn(2, False, width=4, level=0, draws=4)
        rich.learn(2, False, width=4, level=0, draws=4)
    assert rich.expected(4, 4) > lean.expected(4, 4) + 0.1
    assert rich.expected(4, 1) == pytest.approx(lean.expected(4, 1))


def test_acceptance_by_rank_is_learned_and_forgotten() -> None:
    ranks = AcceptanceByRank(4)
    first = ranks.values
    assert first == (0.7, 0.2, 0.05)  # and too little for the fourth
    for _ in range(300):
        ranks.learn(1, draws=2)
        ranks.learn(None, draws=3)
    # The second draw was taken every other time, and no other ever.
    assert ranks.values in {(0.0, 0.45), (0.0, 0.5)}
    for _ in range(2000):
        ranks.forget()
    assert ranks.values == first


def test_some_acceptance_is_always_expected() -> None:
    ranks = AcceptanceByRank(3)
    for _ in range(1000):
        ranks.learn(None, draws=3)
    assert ranks.values == (0.05,)


def test_acceptance_by_rank_is_that_of_exclusive_events() -> None:
    """However it was learned: ranks that few nodes have keep more of their first value."""
    ranks = AcceptanceByRank(8)
    for _ in range(500):
        ranks.learn(0, draws=1)
    assert sum(ranks.values) <= 1.0
    assert ranks.values[0] > 0.6
