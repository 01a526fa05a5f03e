# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from logits_processors.race import arrival_times, ascending, log_exponentials, uniforms


@pytest.mark.parametrize("draw", [uniforms, log_exponentials])
def test_noise_depends_on_every_coordinate_and_on_nothing_else(draw):
    base = draw(7, 3, 1000)
    np.testing.assert_array_equal(base, draw(7, 3, 1000))
    np.testing.assert_array_equal(base[:10], draw(7, 3, 10))
    others = [
        draw(8, 3, 1000),
        draw(7, 4, 1000),
        draw(7, 3, 1000, attempt=1),
        draw(7, 3, 1000, stream=1),
    ]
    for other in others:
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.15
        assert not np.isin(other, base).any()


def test_noise_is_uniform_on_the_open_interval():
    noise = np.concatenate([uniforms(seed, 0, 1000) for seed in range(-20, 20)])
    assert 0.0 < noise.min() < noise.max() < 1.0
    assert stats.kstest(noise, "uniform").pvalue > 1e-3
    assert stats.kstest(noise**1.05, "uniform").pvalue < 1e-3  # the test can fail


def test_race_noise_is_exponential():
    noise = np.concatenate([np.exp(log_exponentials(seed, 0, 1000)) for seed in range(40)])
    assert stats.kstest(noise, "expon").pvalue > 1e-3
    assert stats.kstest(noise**1.05, "expon").pvalue < 1e-3  # the test can fail


@pytest.mark.parametrize("power", [1.0, 0.8])
def test_first_two_arrivals_are_a_draw_without_replacement(power):
    p = np.array([0.5, 0.3, 0.15, 0.05])
    counts = np.zeros((4, 4))
    for seed in range(8000):
        order = ascending(arrival_times(power * np.log(p), log_exponentials(seed, 0, 4)))
        counts[next(order), next(order)] += 1
    expected = p[:, None] * p[None, :] / (1.0 - p[:, None])
    off = ~np.eye(4, dtype=bool)
    assert counts[~off].sum() == 0
    fit = stats.chisquare(counts[off], 8000 * expected[off]).pvalue
    # A race with the wrong rates is told from the right one.
    assert (fit > 1e-3) == (power == 1.0)


def test_impossible_tokens_never_arrive():
    times = arrival_times(np.array([-np.inf, 0.0, -np.inf]), log_exponentials(0, 0, 3))
    assert list(ascending(times)) == [1]


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, np.inf]), max_size=400))
def test_lazy_order_is_the_stable_sort(values):
    keys = np.array(values)
    expected = [i for i in np.argsort(keys, kind="stable").tolist() if np.isfinite(keys[i])]
    assert list(ascending(keys)) == expected


def test_lazy_order_over_several_chunks():
    keys = np.random.default_rng(0).normal(size=5000)
    assert list(ascending(keys)) == np.argsort(keys).tolist()
