# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from toy_model import EOS, GRAMMAR, TINY, ToyModel, exact

from logits_processors.awrs import Awrs
from logits_processors.law import SamplingLaw
from logits_processors.smc import (
    Particles,
    effective_sample_size,
    log_mean,
    normalized,
    systematic_resample,
)
from logits_processors.xgrammar_constraint import compile_xgrammar

weights = arrays(
    np.float64, st.integers(1, 30), elements=st.one_of(st.floats(-800, 0), st.just(-np.inf))
)


@given(weights)
def test_effective_sample_size_is_between_one_and_n(log_weights):
    ess = effective_sample_size(log_weights)
    alive = int(np.isfinite(log_weights).sum())
    assert ess == 0.0 if alive == 0 else 1.0 - 1e-9 <= ess <= alive + 1e-9


def test_effective_sample_size_of_known_weights():
    assert effective_sample_size(np.zeros(7) - 1000.0) == pytest.approx(7.0)
    assert effective_sample_size(np.log([3.0, 1.0])) == pytest.approx(16 / 10)


@given(weights.filter(lambda w: np.isfinite(w).any()), st.floats(0, 1, exclude_max=True))
def test_offspring_are_the_expected_number_rounded(log_weights, uniform):
    ancestors = systematic_resample(log_weights, uniform)
    offspring = np.bincount(ancestors, minlength=log_weights.size)
    expected = normalized(log_weights) * log_weights.size
    assert offspring.sum() == log_weights.size
    assert (np.abs(offspring - expected) < 1.0 + 1e-9).all()
    assert (offspring[normalized(log_weights) == 0] == 0).all()


def test_offspring_are_unbiased():
    log_weights = np.log([0.1, 0.45, 0.05, 0.4])
    grid = (np.arange(4000) + 0.5) / 4000
    counts = sum(np.bincount(systematic_resample(log_weights, u), minlength=4) for u in grid)
    np.testing.assert_allclose(counts / 4000, 4 * np.exp(log_weights), atol=1e-2)


def test_dead_population():
    particles = Particles(3)
    particles.reweight(np.full(3, -np.inf))
    assert (particles.ess, particles.log_evidence) == (0.0, -math.inf)
    assert particles.resample(0.5) is None
    with pytest.raises(ValueError, match="weight 0"):
        systematic_resample(np.full(3, -np.inf), 0.5)


def test_threshold_decides():
    particles = Particles(4, ess_threshold=0.5)
    particles.reweight(np.log([1.0, 1.0, 1.0, 0.5]))
    assert particles.resample(0.5) is None
    particles.reweight(np.array([0.0, -9.0, -9.0, -9.0]))
    before = particles.log_evidence
    ancestors = particles.resample(0.5)
    assert ancestors is not None
    assert ancestors.tolist() == [0, 0, 0, 0]
    assert particles.log_weights.tolist() == [0.0] * 4
    assert particles.log_evidence == pytest.approx(before)


@pytest.mark.parametrize(
    "bad", [np.zeros(2), np.array([0.0, np.nan, 0.0]), np.array([0.0, np.inf, 0.0])]
)
def test_bad_weights_are_refused(bad):
    with pytest.raises(ValueError, match="log_increments"):
        Particles(3).reweight(bad)


@pytest.mark.parametrize("arguments", [{"count": 0}, {"count": 2, "ess_threshold": 1.5}])
def test_out_of_range_is_refused(arguments):
    with pytest.raises(ValueError, match="allowed"):
        Particles(**arguments)


def smc(model, compiled, sampler, count, seed, threshold):
    """A whole SMC run over AWRS; returns the log evidence and the weighted share of "00000"."""
    rng = np.random.default_rng(seed)
    particles = Particles(count, threshold)
    states = [sampler.start(compiled.start(), seed * 1000 + i) for i in range(count)]
    texts = [() for _ in range(count)]
    for _ in range(6):
        increments = np.zeros(count)
        for i, state in enumerate(states):
            draw = sampler.step(state, model.logits(texts[i]))
            increments[i] = draw.log_weight
            if draw.token is not None:
                sampler.advance(state, draw.token)
                texts[i] = (*texts[i], draw.token)
        particles.reweight(increments)
        ancestors = particles.resample(rng.random())
        if ancestors is not None:
            texts = [texts[a] for a in ancestors]
            states = [
                sampler.start(states[a].constraint.fork(), int(rng.integers(2**63)))
                for a in ancestors
            ]
    zeros = np.array([text == (0, 0, 0, 0, 0, EOS) for text in texts])
    return particles.log_evidence, float((normalized(particles.log_weights) * zeros).sum())


@pytest.mark.parametrize("threshold", [0.0, 0.9])
def test_evidence_is_unbiased_and_texts_follow_the_conditional(threshold):
    model, law = ToyModel(12), SamplingLaw()
    compiled = compile_xgrammar("ebnf", GRAMMAR, TINY)
    truth, mass = exact(model, law)
    runs = [smc(model, compiled, Awrs(law), 16, seed, threshold) for seed in range(60)]
    evidence = np.exp([log_evidence for log_evidence, _ in runs])
    error = evidence.std() / math.sqrt(len(runs))
    assert abs(evidence.mean() - mass) < 4 * error
    assert error < 0.1 * mass
    # The ratio estimator: each run weighs by its evidence.
    share = np.array([share for _, share in runs])
    expected = truth[(0, 0, 0, 0, 0, EOS)]
    residual = evidence * (share - expected)
    assert abs(residual.mean()) < 4 * residual.std() / math.sqrt(len(runs))


def test_log_mean_does_not_underflow():
    assert log_mean(np.full(4, -5000.0)) == pytest.approx(-5000.0)
