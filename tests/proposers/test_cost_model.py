# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proposers import CostModel, DySpecOptions, Mixture, TokenTree
from proposers.cost_model import AttentionCost
from proposers.dyspec import DySpec
from proposers.grower import Draftee

PRIOR = [(1, 0.030), (8, 0.036), (16, 0.050), (64, 0.120)]

priors = st.dictionaries(st.integers(1, 80), st.floats(0.001, 1.0), min_size=1, max_size=6).map(
    lambda d: list(d.items())
)
records = st.lists(st.tuples(st.integers(-1, 120), st.floats(0.0001, 10.0)), max_size=30)


@given(priors, records)
def test_curve_is_positive_and_never_falls(
    prior: list[tuple[int, float]], history: list[tuple[int, float]]
) -> None:
    model = CostModel(prior)
    for rows, seconds in history:
        model.record(rows, seconds)
    curve = model.curve(100)
    assert curve.shape == (101,)
    assert curve.dtype == np.float64
    assert np.all(curve > 0)
    assert np.all(np.diff(curve) >= -1e-12)
    for asked in range(1, 101):  # one by one it is read another way
        assert model.seconds(asked) == pytest.approx(curve[asked])


def test_prior_is_interpolated_and_extrapolated() -> None:
    model = CostModel(PRIOR)
    for rows, seconds in PRIOR:
        assert model.seconds(rows) == pytest.approx(seconds)
    assert model.seconds(12) == pytest.approx(0.043)
    assert model.seconds(127) == pytest.approx(0.120 + 0.090)
    assert CostModel([(4, 0.03)]).seconds(99) == pytest.approx(0.03)


@given(st.integers(1, 64), st.floats(1e-6, 1e3))
def test_one_outlier_moves_the_curve_little(rows: int, seconds: float) -> None:
    model = CostModel(PRIOR)
    before = model.curve(64)
    model.record(rows, seconds)
    assert np.all(np.abs(np.log(model.curve(64) / before)) < 0.1)


def test_repeated_measurements_win() -> None:
    """Negative control of the test above: what lasts must be learned."""
    model = CostModel(PRIOR)
    rng = np.random.default_rng(0)
    for _ in range(1500):
        rows = int(rng.integers(1, 65))
        truth = 0.060 + 0.001 * rows
        model.record(rows, truth * float(np.exp(rng.normal(0, 0.1))))
    for rows in (1, 8, 30, 64):
        assert model.seconds(rows) == pytest.approx(0.060 + 0.001 * rows, rel=0.12)


def test_slow_steps_at_one_size_do_not_stay_shared() -> None:
    """When only many rows get dearer, steps of one row must not look dearer in the end."""
    model = CostModel(PRIOR)
    for _ in range(300):
        model.record(1, 0.030)
        model.record(64, 0.240)
    assert model.seconds(1) == pytest.approx(0.030, rel=0.05)
    assert model.seconds(64) == pytest.approx(0.240, rel=0.05)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_measurements_are_ignored(seconds: float) -> None:
    model = CostModel(PRIOR)
    model.record(8, seconds)
    assert model.seconds(8) == pytest.approx(0.036)


probs = st.lists(st.floats(0.0, 1.0), max_size=40).map(lambda p: sorted(p, reverse=True))


@given(priors, st.integers(1, 40), st.integers(1, 8), probs, st.sampled_from([0.0, 0.02, 0.3]))
def test_best_size_is_the_brute_force_argmax(
    prior: list[tuple[int, float]],
    base_rows: int,
    base_tokens: int,
    sorted_probs: list[float],
    margin: float,
) -> None:
    model = CostModel(prior, margin=margin)
    size = model.best_size(base_rows, base_tokens, sorted_probs)
    rates = [
        (base_tokens + sum(sorted_probs[:n])) / model.seconds(base_rows + n)
        for n in range(len(sorted_probs) + 1)
    ]
    if size == 0:
        assert max(rates) <= rates[0] * (1 + margin) * (1 + 1e-9)
    else:
        assert rates[size] >= max(rates) * (1 - 1e-9)
        assert rates[size] > rates[0] * (1 + margin) * (1 - 1e-9)


@given(priors, st.integers(1, 40), probs)
def test_hopeless_never_stops_before_the_best_size(
    prior: list[tuple[int, float]], base_rows: int, sorted_probs: list[float]
) -> None:
    model = CostModel(prior)
    best = model.best_size(base_rows, 1.0, sorted_probs)
    search = model.search(base_rows, 1.0, len(sorted_probs))
    for n, prob in enumerate(sorted_probs):
        if prob < search.min_prob or search.hopeless(prob):
            assert best <= n
            break
        search.add(prob)
    assert search.size == best


def test_hopeless_does_stop() -> None:
    assert CostModel(PRIOR).search(1, 1.0, 0).hopeless(0.9)  # no room for a node
    search = CostModel(PRIOR).search(1, 1.0, 40)
    assert not search.hopeless(0.9)
    assert search.hopeless(0.01)
    # The next node does not pay, ten would.
    step = CostModel([(1, 0.030), (2, 0.045), (11, 0.045)]).search(1, 1.0, 10)
    assert not step.hopeless(0.4)


def test_nothing_is_drafted_when_nothing_pays() -> None:
    steep = CostModel([(1, 0.030), (2, 0.060), (64, 1.9)])
    assert steep.best_size(1, 1, [0.9, 0.8]) == 0
    flat = CostModel([(1, 0.030), (64, 0.0301)])
    assert flat.best_size(1, 1, [0.9, 0.8]) == 2
    assert flat.best_size(1, 1, [0.01]) == 0  # below the margin
    assert flat.best_size(1, 1, []) == 0


def test_the_gain_is_that_of_the_mean_request() -> None:
    cost = CostModel([(4, 0.040), (8, 0.050)])
    even = [TokenTree.chain([1], [0.5])] * 4
    assert cost.gain(4, even) == pytest.approx(1.5 / 1.25 - 1)
    # As many tokens per second, but three of four requests only wait longer.
    uneven = [TokenTree.chain([1, 2, 3, 4], [0.5] * 4), *[TokenTree.EMPTY] * 3]
    assert cost.gain(4, uneven) == pytest.approx(4 / (1 / 3 + 3) / 1.25 - 1)
    assert cost.gain(4, uneven) < 0 < cost.gain(4, even)
    assert cost.gain(4, [TokenTree.EMPTY] * 4) == 0
    assert cost.gain(4, even, 0.010) == pytest.approx(1.5 / 1.5 - 1)
    bush = [TokenTree((1, 2), (-1, -1), (0.5, 0.5))]
    cost.branching = 0.010
    assert cost.gain(4, bush) == pytest.approx(2 / (0.055 / 0.040) - 1)


def test_a_step_in_the_curve_is_looked_across() -> None:
    # The first node makes the step dearer, the next nine are free.
    model = CostModel([(1, 0.030), (2, 0.045), (11, 0.045)])
    assert model.best_size(1, 1, [0.4]) == 0
    assert model.best_size(1, 1, [0.4] * 10) == 10


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ([], "at least one"),
        ([(1, 0.1), (1, 0.2)], "once"),
        ([(0, 0.1)], "at least 1"),
        ([(1, 0.0)], "positive"),
        ([(1, float("nan"))], "positive"),
    ],
)
def test_bad_priors_are_refused(prior: list[tuple[int, float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CostModel(prior)


def truth(rows: int, context: float, drafted: float) -> float:
    """A machine whose attention is as dear as its rows."""
    return 0.030 + 0.0008 * rows + 2e-6 * context + 1.5e-6 * drafted


def test_it_converges_to_the_truth_about_attention() -> None:
    """From a curve and coefficients that are off, through noise, at loads that vary."""
    rng = np.random.default_rng(1)
    prior = [(r, truth(r, 0, 0) * f) for r, f in ((1, 0.8), (4, 1.2), (16, 0.9), (64, 1.1))]
    model = CostModel(prior, attention=AttentionCost(4e-6, 5e-7))
    for _ in range(6000):
        requests, nodes = int(rng.integers(1, 9)), int(rng.integers(0, 2) * rng.integers(1, 9))
        context = float(requests * rng.integers(50, 2000))
        load = {"context": context, "drafted": nodes * context}
        rows = requests * (1 + nodes)
        model.record(rows, truth(rows, **load) * float(np.exp(rng.normal(0, 0.1))), **load)
    errors = []
    for requests, nodes, length in itertools.product((1, 4, 8), (0, 2, 8), (100, 700, 1900)):
        rows, contexts = requests * (1 + nodes), [length] * requests
        expected = truth(rows, sum(contexts), nodes * sum(contexts))
        errors.append(model.in_context(requests, contexts).seconds(rows) / expected - 1.0)
    assert np.mean(np.abs(errors)) < 0.08
    assert np.max(np.abs(errors)) < 0.25
    # Control: rows alone cannot tell it.
    assert model.seconds(72) < 0.5 * truth(72, 8 * 1900, 64 * 1900)


def test_it_learns_what_a_branch_costs() -> None:
    rng = np.random.default_rng(1)
    model = CostModel([(1, 0.030), (64, 0.060)], attention=AttentionCost(branching=0.0002))
    for _ in range(1500):
        branching = int(rng.integers(0, 5))
        rows = int(rng.integers(8, 17)) + branching
        seconds = model.seconds(rows) + 0.002 * branching
        model.record(
            rows, seconds * float(np.exp(rng.normal(0, 0.05))), drafted=8.0, branching=branching
        )
    assert model.in_context(8, [1] * 8).branching == pytest.approx(0.002, rel=0.3)


def drafting_engine(*, told: bool) -> CostModel:
    """After hours in which every step of 8 requests had drafts, 10 ms of it outside the pass."""
    model = CostModel([(8, 0.040), (16, 0.044), (32, 0.052)], margin=0.0)
    for step in range(600):
        nodes = 4 + step % 9
        rows = 8 + nodes
        seconds = float(np.interp(rows, [8, 16, 32], [0.040, 0.044, 0.052]))
        outside = {"outside": 0.010, "sampling": 0.002, "verified": rows} if told else {}
        model.record(rows, seconds + 0.010, context=8.0, drafted=float(nodes), **outside)
    return model


def test_drafting_is_not_taken_for_the_price_of_plain_steps() -> None:
    truth, drafting = 0.040, 0.0455 + 0.010
    cost = drafting_engine(told=True).in_context(8, [1] * 8)
    assert cost.seconds(8) == pytest.approx(truth, rel=0.03)
    assert cost.seconds(19) == pytest.approx(drafting, rel=0.05)
    # Twelve tokens do not pay for a step that takes 39% longer.
    assert cost.best_size(8, 8.0, [2.6 / 11] * 11) == 0
    # Control: where the model is not told, it believes that plain steps are slow as well.
    blind = drafting_engine(told=False).in_context(8, [1] * 8)
    assert blind.seconds(8) > 1.06 * truth
    assert blind.best_size(8, 8.0, [2.6 / 11] * 11) == 11


def test_steps_with_prompts_do_not_teach_what_sampling_costs() -> None:
    model = CostModel(PRIOR)
    model.record(9, 0.1, drafted=4.0, verified=9, outside=0.018, sampling=0.001)
    model.record(1, 0.1, verified=1, outside=0.003, sampling=0.001)
    assert model.outside == (pytest.approx(0.001), pytest.approx(0.002))
    model.record(300, 0.9, drafted=4.0, verified=9, outside=0.3, sampling=0.3)
    assert model.outside == (pytest.approx(0.001), pytest.approx(0.002))


def test_a_long_context_makes_trees_smaller_when_attention_is_dear(table_source) -> None:
    table = {token: {0: 0.5, 1: 0.3} for token in range(2)}

    def nodes(attention: AttentionCost, length: int) -> int:
        source = table_source(table)
        source.start("r", [0], greedy=True)
        model = CostModel([(1, 0.030), (64, 0.060)], attention=attention)
        cost = model.in_context(1, [length])
        grower = DySpec(Mixture([source]), DySpecOptions(max_nodes=40))
        draftee = Draftee("r", greedy=True, chain=False, limit=40)
        return len(grower.grow([draftee], cost, base_rows=1, base_tokens=1.0)[0])

    dear = [nodes(AttentionCost(0.0, 3e-6), length) for length in (10, 300, 2000, 20000)]
    assert dear == sorted(dear, reverse=True)
    assert dear[0] > dear[1] > dear[2] > dear[3] == 0
    assert dear[0] > 2 * dear[2]
    free = [nodes(AttentionCost(), length) for length in (10, 20000)]  # control
    assert free[0] == free[1] >= dear[0]


def test_a_dear_plain_step_makes_room_for_drafts() -> None:
    """Attention that every step pays is no reason against a draft."""
    model = CostModel([(1, 0.030), (9, 0.054)], attention=AttentionCost(1e-5, 0.0))
    assert model.in_context(1, [10]).best_size(1, 1.0, [0.09] * 8) == 0
    assert model.in_context(1, [20000]).best_size(1, 1.0, [0.09] * 8) == 8


loads = st.one_of(
    st.floats(max_value=-1e-9), st.just(float("nan")), st.just(float("inf")), st.just(-float("inf"))
)


@given(
    loads, st.sampled_from(["context", "drafted", "branching", "outside", "sampling", "seconds"])
)
def test_recorded_nonsense_is_ignored(value: float, name: str) -> None:
    model = CostModel(PRIOR, attention=AttentionCost(1e-6, 1e-6))
    before = model.in_context(2, [500, 700]).curve(64).tolist()
    load = {"context": 100.0, "drafted": 100.0, "branching": 1.0, "outside": 0.01, "verified": 8}
    model.record(8, **{"seconds": 0.1, **load, name: value})
    assert model.in_context(2, [500, 700]).curve(64).tolist() == before
    model.record(8, 0.1, context=100.0, drafted=100.0)  # control: sense is not
    assert model.in_context(2, [500, 700]).curve(64).tolist() != before


steps = st.lists(
    st.tuples(st.integers(1, 300), st.floats(1e-6, 1e3), st.floats(0, 1e7), st.floats(0, 1e9)),
    max_size=60,
)


@given(priors, steps, st.lists(st.integers(1, 5000), min_size=1, max_size=8))
def test_any_history_leaves_a_curve_in_every_context(
    prior: list[tuple[int, float]], history: list, contexts: list[int]
) -> None:
    model = CostModel(prior)
    for rows, seconds, context, drafted in history:
        model.record(rows, seconds, context=context, drafted=drafted)
    base = len(contexts)
    curve = model.in_context(base, contexts).curve(100)
    assert np.all(np.isfinite(curve))
    assert np.all(curve > 0)
    assert np.all(np.diff(curve) >= -1e-9 * curve[1:])
    assert curve[base] >= 0.9 * model.seconds(base)  # with the benefit of the doubt


@given(priors, st.integers(1, 8), probs, st.floats(0, 1e-4), st.integers(1, 3000))
def test_the_search_in_context_is_the_brute_force_argmax(
    prior: list[tuple[int, float]],
    requests: int,
    sorted_probs: list[float],
    drafted: float,
    length: int,
) -> None:
    model = CostModel(prior, attention=AttentionCost(1e-6, drafted))
    cost = model.in_context(requests, [length] * requests)
    size = cost.best_size(requests, requests, sorted_probs)
    rates = [
        (requests + sum(sorted_probs[:n])) / cost.seconds(requests + n)
        for n in range(len(sorted_probs) + 1)
    ]
    assert rates[size] >= max(rates) * (1 - 1e-9) or max(rates) <= rates[0] * 1.02 * (1 + 1e-9)


def test_what_did_not_pay_long_ago_is_tried_again() -> None:
    """After a busy hour nothing is drafted, so nothing new is measured about drafts."""
    model = CostModel(PRIOR, attention=AttentionCost(1e-6, 1e-7))

    def size() -> int:
        return model.in_context(1, [1000]).best_size(1, 1.0, [0.5, 0.3, 0.2, 0.1])

    fresh = size()
    assert fresh > 0
    for _ in range(100):
        model.record(5, 0.1, context=1000.0, drafted=4000.0)
        model.record(1, 0.031, context=1000.0)
    assert size() == 0
    for _ in range(8000):
        model.record(1, 0.031, context=1000.0)
    assert size() == fresh


@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf")])
def test_bad_attention_costs_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        AttentionCost(context=value)
