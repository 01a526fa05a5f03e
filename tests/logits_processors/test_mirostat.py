# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from logits_processors.mirostat import Mirostat, _zipf_rank


def zipf(size, exponent):
    p = np.arange(1, size + 1, dtype=float) ** -exponent
    return np.log(p / p.sum())


def test_version_2_keeps_what_is_not_too_surprising():
    rule = Mirostat()
    surprise = rule.surprise(np.log([0.5, 0.25, 0.125, 0.125]))
    np.testing.assert_allclose(surprise, [1, 2, 3, 3])
    assert rule.keep(surprise, 2.0).tolist() == [True, True, False, False]
    assert rule.keep(surprise, 3.0).all()
    assert rule.keep(surprise, -5.0).tolist() == [True, False, False, False]


@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.3])
def test_version_1_keeps_the_rank_of_a_zipf_law(exponent):
    size, mu = 5000, 6.0
    rule = Mirostat(version=1)
    kept = rule.keep(rule.surprise(zipf(size, exponent)), mu)
    # The paper's rank from the true exponent, with the sum over n taken as an integral.
    epsilon = exponent - 1
    factor = 1 / math.log(size) if not epsilon else epsilon / (1 - size**-epsilon)
    rank = (factor * 2**mu) ** (1 / exponent)
    assert kept.sum() == pytest.approx(rank, abs=2 + 0.02 * rank)
    assert kept[: kept.sum()].all()


@given(
    arrays(np.float64, st.integers(1, 300), elements=st.sampled_from([0.5, 1, 2, 3, 7, np.inf])),
    st.floats(-2, 12),
)
def test_version_1_is_what_sorting_all_tokens_gives(surprise, mu):
    surprise[0] = 1.0  # a law has a token of some probability
    order = np.argsort(surprise, kind="stable")
    ordered = surprise[order]
    rank = _zipf_rank(ordered[np.isfinite(ordered)][:100], surprise.size, mu)
    expected = np.zeros(surprise.size, bool)
    expected[order[: int(min(rank, surprise.size - 1)) + 1]] = True
    assert Mirostat(version=1).keep(surprise, mu).tolist() == expected.tolist()


def test_version_1_on_degenerate_laws():
    rule = Mirostat(version=1)
    assert rule.keep(rule.surprise(np.array([0.0, -np.inf, -np.inf])), 6.0).sum() == 1
    assert rule.keep(rule.surprise(np.zeros(50)), 6.0).all()


def test_temperature_is_part_of_the_surprise():
    row = np.array([2.0, 0.0])
    np.testing.assert_allclose(
        Mirostat(temperature=2.0).surprise(row), Mirostat().surprise(row / 2)
    )


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tau", [4.0, 5.0])
def test_feedback_holds_the_surprise_at_the_target(version, tau):
    rng = np.random.default_rng(0)
    rule = Mirostat(version=version, tau=tau, eta=0.2)
    mu, history = rule.initial_mu, []
    for _ in range(1500):
        surprise = rule.surprise(zipf(2000, rng.uniform(0.9, 1.4)))
        p = np.where(rule.keep(surprise, mu), 2.0**-surprise, 0.0)
        token = rng.choice(p.size, p=p / p.sum())
        mu = rule.update(mu, surprise[token])
        history.append(surprise[token])
    assert np.mean(history[300:]) == pytest.approx(tau, abs=0.15)


@pytest.mark.parametrize("bad", [{"version": 3}, {"tau": 0.0}, {"eta": -1.0}, {"temperature": 0}])
def test_out_of_range_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Mirostat(**bad)
