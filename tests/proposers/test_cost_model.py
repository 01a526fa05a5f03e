# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proposers import CostModel

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
    assert model.seconds(37) == pytest.approx(curve[37])


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
