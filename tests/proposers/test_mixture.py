# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from proposers import Mixture
from proposers.mixture import Bias

# Three kinds of context (token 0, 1, 2 comes last), two sources that differ in them.
SHARP = {0: {10: 0.8, 11: 0.2}, 1: {12: 1.0}}
BLUNT = {0: {10: 0.3, 13: 0.3, 14: 0.3}, 2: {15: 0.5, 16: 0.4}}
# What the target does: it follows neither source exactly.
TARGET = {
    0: {10: 0.45, 11: 0.1, 13: 0.1, 14: 0.1, 20: 0.25},
    1: {12: 0.35, 21: 0.65},
    2: {15: 0.3, 16: 0.25, 22: 0.45},
}


def run(mixture: Mixture, n: int, seed: int, target: dict, greedy: bool) -> dict[int, float]:
    """Teach the mixture n tokens per context; mean prediction of coverage over the last half."""
    rng = np.random.default_rng(seed)
    covered: dict[int, list[float]] = {context: [] for context in target}
    for i in range(n):
        for context, law in target.items():
            prediction = mixture.predict([context, context], greedy)
            if i >= n // 2:
                covered[context].append(sum(prediction.probs.values()))
            mixture.learn(prediction, int(rng.choice(list(law), p=list(law.values()))))
    return {context: float(np.mean(values)) for context, values in covered.items()}


@pytest.mark.parametrize("odds", [0.05, 1.0, 20.0])
def test_predicted_acceptance_becomes_the_observed_rate(table_source, odds: float) -> None:
    mixture = Mixture([table_source(SHARP, odds), table_source(BLUNT, odds)])
    coverage = run(mixture, 4000, seed=1, target=TARGET, greedy=True)
    for context, law in TARGET.items():
        named = {**SHARP.get(context, {}), **BLUNT.get(context, {})}
        truth = sum(p for token, p in law.items() if token in named)
        assert coverage[context] == pytest.approx(truth, abs=0.05)


def test_without_learning_the_prediction_stays_wrong(table_source) -> None:
    """Negative control of the test above."""
    mixture = Mixture([table_source(SHARP, 20.0), table_source(BLUNT, 20.0)])
    prediction = mixture.predict([1, 1], greedy=True)
    assert abs(sum(prediction.probs.values()) - 0.35) > 0.3


def test_single_source_probability_is_calibrated_token_by_token(table_source) -> None:
    # The target follows the source in 60% of the cases: the mixture should learn the factor.
    law = {10: 0.48, 11: 0.12, 20: 0.4}
    mixture = Mixture([table_source(SHARP, 1.0), table_source({}, 1.0)])
    run(mixture, 3000, seed=2, target={0: law}, greedy=False)
    probs = mixture.predict([0, 0], greedy=False).probs
    assert probs[10] == pytest.approx(0.48, abs=0.05)
    assert probs[11] == pytest.approx(0.12, abs=0.03)


def test_the_better_source_gets_the_weight(table_source) -> None:
    good, bad = {0: {1: 1.0}}, {0: {2: 1.0}}
    mixture = Mixture([table_source(good, 1.0), table_source(bad, 1.0)])
    before = mixture.predict([0, 0], greedy=True).probs
    assert before[1] == before[2]
    for _ in range(100):
        mixture.learn(mixture.predict([0, 0], greedy=True), 1)
    after = mixture.predict([0, 0], greedy=True).probs
    assert after[1] > 0.85
    assert after[2] < 0.08


def test_weights_recover_when_the_text_changes(table_source) -> None:
    # Both name token 1: a weight that had vanished would stay so, however well its source fits.
    mixture = Mixture([table_source({0: {1: 0.1, 2: 0.9}}, 1.0), table_source({0: {1: 1.0}}, 1.0)])
    for token, steps in ((2, 10_000), (1, 800)):
        for _ in range(steps):
            mixture.learn(mixture.predict([0, 0], greedy=True), token)
        assert mixture.predict([0, 0], greedy=True).probs[token] > 0.6


def test_greedy_and_sampled_requests_learn_apart(table_source) -> None:
    mixture = Mixture([table_source({0: {1: 1.0}}, 1.0)])
    for _ in range(200):
        mixture.learn(mixture.predict([0], greedy=True), 1)
        mixture.learn(mixture.predict([0], greedy=False), 7)
    assert mixture.predict([0], greedy=True).probs[1] > 0.9
    assert mixture.predict([0], greedy=False).probs[1] < 0.1


def test_probabilities_never_exceed_one_in_sum(table_source) -> None:
    mixture = Mixture([table_source(SHARP, 1e9), table_source(BLUNT, 1e9)])
    rng = np.random.default_rng(3)
    for _ in range(500):
        prediction = mixture.predict([0, 0], greedy=True)
        assert sum(prediction.probs.values()) <= 1.0 + 1e-9
        mixture.learn(prediction, int(rng.choice([10, 13, 99])))


def test_nobody_knows(table_source) -> None:
    mixture = Mixture([table_source({}), table_source({})])
    prediction = mixture.predict([5, 5], greedy=True)
    assert prediction.probs == {}
    mixture.learn(prediction, 3)


def test_a_request_leans_on_what_its_own_text_follows(table_source) -> None:
    """Half of the requests follow one source, half the other: common weights can't tell."""
    first, second = table_source({0: {1: 1.0}}, 1.0), table_source({0: {2: 1.0}}, 1.0)
    mixture = Mixture([first, second])
    biases = {1: Bias(2), 2: Bias(2)}
    for _ in range(150):
        for token, bias in biases.items():
            mixture.learn(mixture.predict([0, 0], greedy=True, bias=bias), token)
    common = mixture.predict([0, 0], greedy=True).probs
    assert common[1] == pytest.approx(common[2], abs=0.05)
    for token, bias in biases.items():
        probs = mixture.predict([0, 0], greedy=True, bias=bias).probs
        assert probs[token] > 0.8
        assert sum(probs.values()) <= 1.0 + 1e-9
    fresh = mixture.predict([0, 0], greedy=True, bias=Bias(2)).probs
    assert fresh == pytest.approx(common)


def test_a_requests_factors_carry_over_to_other_buckets(table_source) -> None:
    first, second = {0: {1: 1.0}, 5: {6: 1.0}}, {0: {2: 1.0}}
    both = Mixture([table_source(first, 1.0), table_source(second, 1.0)])
    bias = Bias(2)
    before = both.predict([5, 5], greedy=True, bias=bias).probs[6]
    for _ in range(30):
        both.learn(both.predict([0, 0], greedy=True, bias=bias), 1)
    assert both.predict([5, 5], greedy=True, bias=bias).probs[6] > before
    assert both.predict([5, 5], greedy=True).probs[6] == pytest.approx(before)


def test_a_predictable_text_raises_all_sources_and_not_beyond_one(table_source) -> None:
    mixture = Mixture([table_source(SHARP, 0.5), table_source(BLUNT, 0.5)])
    bias = Bias(2)
    before = sum(mixture.predict([0, 0], True, bias).probs.values())
    for _ in range(50):
        mixture.learn(mixture.predict([0, 0], True, bias), 10)
        assert sum(mixture.predict([0, 0], True, bias).probs.values()) <= 1.0 + 1e-9
    assert sum(mixture.predict([0, 0], True, bias).probs.values()) > before
