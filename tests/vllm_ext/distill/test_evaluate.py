# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from vllm_ext.distill.evaluate import (
    CHAIN,
    Agreement,
    Text,
    answers,
    compare,
    covered,
    expected,
    milliseconds,
    replayed,
    summary,
)
from vllm_ext.distill.student import make_student


def test_replayed_steps() -> None:
    # Two agree, one does not; four agree, and the fifth token is the target's own; one does not.
    same = np.array([1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1.0])
    assert replayed(same).tolist() == [2, 4, 0]
    assert replayed(np.ones(10)).tolist() == [4, 4]
    assert replayed(np.ones(3)).tolist() == []


def test_expected_is_unbiased() -> None:
    """Its mean over the target's texts is the law of ratio acceptance, by enumeration."""

    def law(path: tuple[int, ...], seed: int) -> Any:
        own = np.random.default_rng([seed, *path]).random(2) + 0.1
        return own / own.sum()

    estimate = exact = 0.0
    for path in itertools.product(range(2), repeat=CHAIN):
        p = [law(path[:i], 1) for i in range(CHAIN)]
        q = [law(path[:i], 2) for i in range(CHAIN)]
        chance = np.prod([p[i][x] for i, x in enumerate(path)])
        ratio = np.array([min(1.0, q[i][x] / p[i][x]) for i, x in enumerate(path)])
        overlap = np.array([np.minimum(p[i], q[i]).sum() for i in range(CHAIN)])
        (value,) = expected(ratio, overlap)
        estimate += chance * value
    for length in range(1, CHAIN + 1):
        for path in itertools.product(range(2), repeat=length):
            exact += np.prod([min(law(path[:i], 1)[x], law(path[:i], 2)[x])
                              for i, x in enumerate(path)])  # fmt: skip
    assert estimate == pytest.approx(exact, rel=1e-12)


def test_expected_places() -> None:
    ones = np.ones(CHAIN + 2)
    assert expected(ones, ones).tolist() == [CHAIN] * 3
    assert expected(ones[:2], ones[:2]).tolist() == []
    assert expected(np.zeros(CHAIN), 0.5 * np.ones(CHAIN)).tolist() == [0.5]


def test_the_target_accepts_itself(target: Any) -> None:
    prompts = [[3, 4, 5], [9, 8, 7, 6, 5], [20, 21]]
    greedy, sampled = answers(target, prompts, [1], 12, 0, lambda count: None)
    found = summary(compare(target, target, greedy), compare(target, target, sampled))
    assert found["greedy"]["top1_agreement"]["mean"] == 1.0
    assert found["greedy"]["accepted_per_step"]["mean"] == CHAIN
    assert found["t1"]["one_minus_tv"]["mean"] == pytest.approx(1.0, abs=1e-5)
    assert found["t1"]["accepted_per_step"]["mean"] == pytest.approx(CHAIN, abs=1e-4)
    assert found["t1"]["kl"]["mean"] == pytest.approx(0.0, abs=1e-5)


def test_a_cut_target_is_not_accepted_so_often(target: Any) -> None:
    prompts = [[3, 4, 5], [9, 8, 7, 6, 5], [20, 21]]
    greedy, _ = answers(target, prompts, [1], 12, 0, lambda count: None)
    one = compare(target, make_student(target, [0]), greedy)
    found = summary(one, one)
    assert found["greedy"]["top1_agreement"]["mean"] < 0.9
    assert found["t1"]["one_minus_tv"]["mean"] < 0.9
    assert found["t1"]["kl"]["mean"] > 0.05


def test_greedy_answers_are_the_targets_best(target: Any) -> None:
    """Whatever other prompts are answered beside them, and in the order of the prompts."""
    prompts = [[9, 8, 7, 6, 5], [3, 4], [7], [5, 5], [6, 5, 4]]
    greedy, sampled = answers(target, prompts, [1], 6, 0, lambda count: None)
    assert [text.answer for text in sampled] != [text.answer for text in greedy]
    for prompt, text in zip(prompts, greedy, strict=True):
        assert text.prompt == prompt
        same = compare(target, target, [Text(prompt, text.answer)])[0].same
        assert same.all()
        assert len(same) == len(text.answer) > 0


def test_intervals_cover_the_mean() -> None:
    ones = [
        Agreement(*(np.full(8, value) for _ in range(5))) for value in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    found = summary(ones, ones)["greedy"]["top1_agreement"]
    assert found["low"] < found["mean"] == 0.5 < found["high"]


def test_answers_too_short_for_a_chain() -> None:
    one = Agreement(*(np.ones(2) for _ in range(5)))
    assert summary([one], [one])["greedy"]["accepted_per_step"]["mean"] is None


def test_milliseconds(target: Any) -> None:
    assert milliseconds(target, context=4, repeats=2) > 0
    assert milliseconds(target, [3, 4, 5], context=4, repeats=2) > 0


def test_covered() -> None:
    texts = [Text([1, 1], [5, 6, 7]), Text([2], [8])]
    assert covered(texts, [5, 6, 7, 1])["mean"] == 0.75
    assert covered(texts, [2])["mean"] == 0.0
