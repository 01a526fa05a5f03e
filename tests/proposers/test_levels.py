# SPDX-License-Identifier: Apache-2.0
"""The draft model as a source of the mixture."""

from __future__ import annotations

import pytest

from proposers.levels import ModelSource
from proposers.mixture import Mixture
from proposers.registry import SourceContext, check_conformance


def test_it_is_a_source() -> None:
    check_conformance("model", lambda context: ModelSource())
    assert SourceContext(32).vocab_size == 32


def test_it_is_silent_where_the_model_was_not_asked() -> None:
    source = ModelSource()
    root = source.root("r")
    assert source.candidates(root) == (0, {})
    source.tell(root, {3: 0.5})
    assert source.candidates(root)[1] == {3: 0.5}
    assert source.candidates(source.advance(root, 3)) == (0, {})
    assert source.candidates(source.root("r")) == (0, {})


@pytest.mark.parametrize("greedy", [True, False])
def test_buckets_rise_with_confidence_and_so_do_the_odds(greedy: bool) -> None:
    source, odds = ModelSource(), [ModelSource().prior(0, greedy)]
    for best in (0.1, 0.4, 0.7, 0.95):
        state = source.root("r")
        source.tell(state, {1: best, 2: 0.01})
        odds.append(source.prior(source.candidates(state)[0], greedy))
    assert odds[0] == 0.0
    assert odds == sorted(odds)
    assert len(set(odds)) == len(odds)


def test_the_mixture_learns_how_far_to_trust_it() -> None:
    mixture = Mixture([ModelSource()])

    def predict() -> float:
        states = mixture.root("r")
        mixture.sources[0].tell(states[0], {5: 0.95})  # type: ignore[attr-defined]
        prediction = mixture.predict(states, True)
        mixture.learn(prediction, 7)  # it was wrong
        return prediction.probs[5]

    said = [predict() for _ in range(200)]
    assert said[0] > 0.8
    assert said[-1] < 0.1
