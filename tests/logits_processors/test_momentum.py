# SPDX-License-Identifier: Apache-2.0
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logits_processors.momentum import Momentum, circular_depths


def depth(history, candidate):
    """The definition: the longest n-gram ending in the candidate that occurred before."""
    for n in range(6, 0, -1):
        gram = [*history, candidate][-n:]
        if len(gram) == n and any(history[i : i + n] == gram for i in range(len(history) - n + 1)):
            return n
    return 0


@given(st.lists(st.integers(0, 2), max_size=40))
def test_depth_is_the_longest_repeated_ngram(history):
    candidates = np.arange(4)
    expected = [depth(history, int(c)) for c in candidates]
    assert circular_depths(history, candidates).tolist() == expected


def test_resistance_turns_the_walk_away():
    logits = np.log([0.5, 0.4, 0.1])
    assert Momentum().choose(logits, []) == 0
    # "0" would repeat a bigram: 0.5 - 0.2 * 3 < 0.4, and "1" is new.
    assert Momentum().choose(logits, [2, 0, 2]) == 1
    assert Momentum(alpha=0.0).choose(logits, [0] * 20) == 0
    assert Momentum(top_k=1).choose(logits, [0] * 20) == 0


def test_a_token_of_no_probability_is_never_taken():
    logits = np.array([0.0, -1.0, -np.inf, -np.inf])
    assert Momentum(alpha=1.0).choose(logits, [0, 1] * 20) in (0, 1)
    assert Momentum(alpha=1.0).choose(np.array([-np.inf, 0.0]), [1] * 20) == 1


def test_equal_candidates_come_in_order_of_their_ids():
    assert Momentum().choose(np.zeros(1000), []) == 0
    assert Momentum(top_k=3).choose(np.zeros(1000), [0, 1, 5]) == 2


def test_greedy_runs_in_circles_and_momentum_does_not():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(12, 12)) * 0.5

    def walk(rule):
        history = [0]
        for _ in range(60):
            history.append(rule.choose(table[history[-1]], history))
        return len(set(pairwise(history)))

    assert walk(Momentum(alpha=0.0)) < 13
    assert walk(Momentum()) > 2 * walk(Momentum(alpha=0.0))


@pytest.mark.parametrize("bad", [{"alpha": -1.0}, {"alpha": float("inf")}, {"top_k": 0}])
def test_out_of_range_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Momentum(**bad)
