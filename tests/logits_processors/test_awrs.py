# SPDX-License-Identifier: Apache-2.0
"""AWRS against enumeration: every order in which a race can come in, with its probability."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import GRAMMAR, TINY, SetConstraint, ToyModel, exact, generate, orders, times_of

from logits_processors import awrs
from logits_processors.awrs import Awrs
from logits_processors.law import SamplingLaw
from logits_processors.masking import Masking
from logits_processors.sampler import State
from logits_processors.xgrammar_constraint import compile_xgrammar

LAW = SamplingLaw()


def expectation(p, allowed, races=1, weigh=None, **options):
    """E[w 1(x)] for each x, float64[V], by enumerating the orders of ``races`` races."""
    sampler = Awrs(LAW, **options)
    logits = np.log(p)
    result = np.zeros(p.size)
    every = [(times_of(order, p.size), q) for order, q in orders(p)]
    original = awrs.arrival_times
    try:
        for combination in itertools.product(every, repeat=races):
            queue = [times.copy() for times, _ in combination]
            awrs.arrival_times = lambda *_, queue=queue: queue.pop(0)
            draw = sampler.step(State(SetConstraint(allowed, p.size), 0), logits)
            if draw.token is not None:
                weight = math.exp(draw.log_weight) if weigh is None else weigh(draw)
                result[draw.token] += weight * math.prod(q for _, q in combination)
    finally:
        awrs.arrival_times = original
    return result


def target(p, allowed):
    return np.where(np.isin(np.arange(p.size), allowed), p, 0.0)


laws = st.lists(st.floats(1e-3, 1.0), min_size=4, max_size=4).map(lambda x: np.array(x) / sum(x))
allowed_sets = st.sets(st.integers(0, 3)).map(sorted)


@settings(max_examples=40, deadline=None)
@given(laws, allowed_sets, st.integers(1, 4))
def test_recursive_is_properly_weighted(p, allowed, max_rejects):
    found = expectation(p, allowed, max_rejects=max_rejects)
    np.testing.assert_allclose(found, target(p, allowed), rtol=0, atol=1e-12)


@settings(max_examples=6, deadline=None)
@given(laws, allowed_sets, st.integers(1, 4))
def test_two_loop_is_properly_weighted(p, allowed, max_rejects):
    found = expectation(p, allowed, races=2, estimator="two_loop", max_rejects=max_rejects)
    np.testing.assert_allclose(found, target(p, allowed), rtol=0, atol=1e-12)


def test_five_tokens_exactly():
    p = np.random.default_rng(0).dirichlet(np.ones(5))
    np.testing.assert_allclose(expectation(p, [0, 2]), target(p, [0, 2]), rtol=0, atol=1e-12)


def test_recursive_with_zero_probability_tokens():
    p = np.array([0.6, 0.0, 0.4, 0.0])
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(expectation(p, [1, 2]), target(p, [1, 2]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("max_accepts", [2, 3])
@pytest.mark.parametrize("max_rejects", [2, 64])
def test_geometric_is_properly_weighted(max_accepts, max_rejects):
    p, allowed, count = np.array([0.35, 0.2, 0.3, 0.1, 0.05]), [1, 3], 3000
    sampler = Awrs(LAW, "geometric", max_rejects=max_rejects, max_accepts=max_accepts)
    weights = np.zeros((count, p.size))
    for seed in range(count):
        draw = sampler.step(State(SetConstraint(allowed, p.size), seed), np.log(p))
        weights[seed, draw.token] = math.exp(draw.log_weight)
    error = weights.std(axis=0)[allowed] / math.sqrt(count)
    assert (np.abs(weights.mean(axis=0) - target(p, allowed))[allowed] < 4 * error).all()
    # Small enough to have caught the weight 1 of plain masking.
    assert (4 * error < 0.1 * (p[allowed] / p[allowed].sum() - p[allowed])).all()


@pytest.mark.parametrize(
    ("name", "weigh"),
    [
        ("unweighted", lambda draw: 1.0),
        ("one over checks", lambda draw: 1.0 / draw.checks),
        ("accepts over checks, wrong stop", lambda draw: 1.0 / max(1, draw.checks - 1)),
    ],
)
def test_naive_weights_fail(name, weigh):
    p = np.array([0.4, 0.3, 0.2, 0.1])
    found = expectation(p, [1, 3], weigh=weigh)
    assert np.abs(found - target(p, [1, 3])).sum() > 0.01, name


def test_the_draw_alone_is_plain_masking():
    p = np.array([0.4, 0.3, 0.2, 0.1])
    found = expectation(p, [1, 3], weigh=lambda draw: 1.0)
    np.testing.assert_allclose(found, target(p, [1, 3]) / 0.4, rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", ["recursive", "two_loop", "geometric"])
def test_mask_replaces_checks_after_the_bound(estimator):
    size = 2000
    logits = np.zeros(size)
    logits[1990:] = -12.0
    constraint = SetConstraint(range(1990, size), size)
    draw = Awrs(LAW, estimator, max_rejects=8).step(State(constraint, 5), logits)
    assert draw.token is not None
    assert draw.token >= 1990
    assert draw.used_mask
    assert draw.checks == 8
    assert constraint.masks == 1
    if estimator == "recursive":
        mass = 10 * math.exp(-12) / (1990 + 10 * math.exp(-12))
        assert draw.log_weight == pytest.approx(math.log(mass), rel=1e-12)


def test_no_mask_and_few_checks_where_the_model_agrees():
    logits = np.zeros(100)
    logits[3] = 20.0
    constraint = SetConstraint([3, 4], 100)
    draw = Awrs(LAW).step(State(constraint, 0), logits)
    assert (draw.token, draw.used_mask, constraint.masks) == (3, False, 0)
    assert len(constraint.asked) == len(set(constraint.asked)) == draw.checks <= 2


def test_tiny_remaining_mass_does_not_cancel():
    logits = np.array([0.0, -50.0, -51.0])
    draw = Awrs(LAW, max_rejects=10).step(State(SetConstraint([1, 2], 3), 0), logits)
    assert not draw.used_mask
    # Both remaining tokens are allowed, so the weight is their mass.
    assert draw.log_weight == pytest.approx(math.log(math.exp(-50) + math.exp(-51)), rel=1e-9)


@pytest.mark.parametrize("estimator", ["recursive", "two_loop", "geometric"])
@pytest.mark.parametrize("allowed", [[], [2]])
def test_dead_end(estimator, allowed):
    logits = np.array([0.0, 1.0, -np.inf])
    draw = Awrs(LAW, estimator).step(State(SetConstraint(allowed, 3), 0), logits)
    assert (draw.token, draw.log_weight, draw.restart) == (None, -math.inf, False)


def test_nucleus_without_an_allowed_token_is_a_dead_end():
    logits = np.log([0.9, 0.1])
    draw = Awrs(SamplingLaw(top_p=0.5)).step(State(SetConstraint([1], 2), 0), logits)
    assert draw.token is None
    draw = Awrs(SamplingLaw(top_p=0.95)).step(State(SetConstraint([1], 2), 0), logits)
    assert draw.token == 1


@pytest.mark.parametrize("max_rejects", [1, 3, 1000])
def test_greedy_is_the_constrained_argmax_ordered_by_logit_and_id(max_rejects):
    logits = np.array([5.0, 5.0, 4.0, 3.0, 3.0, 3.0], dtype=np.float32)
    greedy = SamplingLaw(temperature=0.0)
    for allowed in ([1, 2], [3, 5], [5, 4], [2], [0, 1]):
        best = min(allowed, key=lambda i: (-logits[i], i))
        for sampler in (Awrs(greedy, max_rejects=max_rejects), Masking(greedy)):
            draw = sampler.step(State(SetConstraint(allowed, 6), 0), logits)
            assert (draw.token, draw.log_weight) == (best, 0.0)
    assert Awrs(greedy).step(State(SetConstraint([], 6), 0), logits).token is None


def test_steps_repeat_and_do_not_move_the_state():
    state = State(SetConstraint([1, 2], 4), 11)
    sampler = Awrs(LAW)
    first = sampler.step(state, np.zeros(4))
    assert sampler.step(state, np.zeros(4)) == first
    assert state.position == 0
    tokens = {
        sampler.step(State(SetConstraint([1, 2], 4), s), np.zeros(4)).token for s in range(20)
    }
    assert tokens == {1, 2}


@pytest.mark.parametrize("estimator", ["recursive", "two_loop", "geometric"])
def test_texts_are_properly_weighted_and_unweighted_ones_are_not(estimator):
    model = ToyModel(10)
    compiled = compile_xgrammar("ebnf", GRAMMAR, TINY)
    truth, mass = exact(model, LAW)
    count = 1000
    sampler = Awrs(LAW, estimator)
    texts, weights = [], []
    for seed in range(count):
        tokens, log_weight, _ = generate(sampler, model, compiled, seed)
        texts.append(tokens)
        weights.append(math.exp(log_weight))
    w = np.array(weights)
    assert abs(w.mean() - mass) < 4 * w.std() / math.sqrt(count)
    zeros = np.array([tokens[0] == 0 for tokens in texts])
    share = truth[(0, 0, 0, 0, 0, 3)]
    weighted = w * zeros - share * w
    assert abs(weighted.mean()) < 4 * weighted.std() / math.sqrt(count)
    assert abs(zeros.mean() - share) > 4 * math.sqrt(0.25 / count)


@pytest.mark.parametrize(
    "options", [{"estimator": "magic"}, {"max_rejects": 0}, {"max_accepts": 1}]
)
def test_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Awrs(LAW, **options)
