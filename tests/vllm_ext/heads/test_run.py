# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ext.distill.errors import DistillError
from vllm_ext.heads import run
from vllm_ext.heads.run import HeadPlan, _read
from vllm_ext.heads.writing import Sample


def texts(*lengths: int) -> list[Sample]:
    return [Sample([1], [number] * length, 0.0) for number, length in enumerate(lengths)]


def test_no_text_is_both_learnt_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "read", lambda model, samples, *others: samples)
    samples = texts(2, 3, 0, 1, 4, 5, 6)
    kept: Any
    kept, held_out = _read(SimpleNamespace(), samples, HeadPlan(held_out=3), 9.0)
    assert [len(s.answer) for s in held_out] == [2, 5]
    assert [len(s.answer) for s in kept] == [3, 4, 6]  # of one token nothing can be learnt


@pytest.mark.parametrize("lengths", [(), (1, 1, 0), (9,), (1, 9, 1)])
def test_too_little_text_is_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(DistillError, match=rf"wrote {len(lengths)} texts, of which [01] have two"):
        _read(SimpleNamespace(), texts(*lengths), HeadPlan(), 9.0)


def test_reading_shares_its_time_between_what_is_learnt_and_what_is_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, float]] = []

    def read(model: Any, samples: list[Sample], top_k: int, advance: Any, budget: float) -> None:
        asked.append((len(samples), budget))

    monkeypatch.setattr(run, "read", read)
    _read(SimpleNamespace(), texts(*[2] * 8), HeadPlan(held_out=4), 8.0)
    assert asked == [(2, 2.0), (6, 6.0)]


@pytest.mark.parametrize(
    ("spent", "reading", "after", "fitting"),
    [
        (40.0, 30.0, 50.0, 50.0),  # read quickly: the training gets what is left
        (40.0, 30.0, 70.0, 30.0),
        (40.0, 30.0, 90.0, 30.0),  # whatever was read, the training has its share
        (65.0, 15.0, 80.0, 30.0),  # the writing took too long
        (200.0, 15.0, 215.0, 30.0),
    ],
)
def test_the_training_has_its_share_of_the_time(
    spent: float, reading: float, after: float, fitting: float
) -> None:
    plan = HeadPlan(training=0.3)
    assert plan.reading(100.0, spent) == pytest.approx(reading)
    assert plan.fitting(100.0, after) == pytest.approx(fitting)
