# SPDX-License-Identifier: Apache-2.0
"""Sizes of drawn trees: chosen by what they promise, learned from what they brought."""

from __future__ import annotations

import random
from typing import Any

import pytest

from proposers.cost_model import CostModel
from proposers.sampled_size import NO_TREE, AcceptanceByRank, Shape, SizeByExpectation
from tests.shapes import optimal_template

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
    assert first == pytest.approx((0.7, 0.21, 0.063, 0.0189))
    for _ in range(300):
        ranks.learn(2, accepted=True)  # the second of two
        ranks.learn(2, accepted=False)
    # The first never, the second every other time, and the third has had no turn.
    assert ranks.values[:3] == pytest.approx((0.05, 0.95 * 0.5, 0.95 * 0.5 * 0.7))
    for _ in range(2000):
        ranks.forget()
    assert ranks.values == pytest.approx(first)


@pytest.mark.parametrize("accepted", [True, False])
def test_acceptance_by_rank_is_that_of_exclusive_events(accepted: bool) -> None:
    ranks = AcceptanceByRank(8)
    for tried in (1, 2, 3, 8):
        for _ in range(500):
            ranks.learn(tried, accepted)
        assert 0.0 < sum(ranks.values) <= 1.0 + 1e-9
        assert min(ranks.values) > 0.0


def test_every_rank_that_is_worth_a_node_gets_its_turn() -> None:
    """Seven children are accepted equally often: a shape learned from few of them has more soon."""
    random.seed(3)
    ranks = AcceptanceByRank(8)
    for _ in range(3000):
        template = optimal_template(ranks.values, 8, 1)
        hit = int(random.random() * 7)
        accepted = hit < len(template)
        ranks.learn(hit + 1 if accepted else len(template), accepted)
    assert len(optimal_template(ranks.values, 8, 1)) >= 7


def test_a_tree_with_more_draws_than_its_width_is_no_wider_one() -> None:
    size, other = SizeByExpectation(WIDTHS, 4), SizeByExpectation(WIDTHS, 4)
    for _ in range(50):
        size.learn(1, True, width=2, level=1, draws=2)
        other.learn(1, True, width=2, level=1, draws=6)
    assert size.expected(4, 3) == other.expected(4, 3)


def test_promises_are_scaled_by_how_many_came_true() -> None:
    size = SizeByExpectation((2,), 1)
    cost = CostModel([(1, 1.0), (3, 1.2)], margin=0.0)
    promised = size.expected(2, 1)
    for _ in range(500):
        size.settle(promised, 0)
        size.settle(promised, 1)
    assert choose(size, cost, 0.1)[1] == pytest.approx(1.5 / 1.3 - 1.0, abs=0.01)
    for _ in range(2000):
        size.settle(promised, 0)
    assert choose(size, cost, 0.1) == (NO_TREE, 0.0)
    for _ in range(2000):  # nothing is drawn, and some day it is tried again
        size.forget()
    assert choose(size, cost, 0.1)[1] == pytest.approx((1.0 + promised) / 1.3 - 1.0, abs=0.01)


def test_a_grower_that_knows_its_promise_is_asked() -> None:
    """One that gains nothing from depth and twice as much from width."""
    size = SizeByExpectation(WIDTHS, 4)
    shape, gain = choose(size, FREE, 0.0, promise=lambda width, depth: 0.1 * width)
    assert shape == Shape(8, 1)
    assert gain == pytest.approx(0.8)
