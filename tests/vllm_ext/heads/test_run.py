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
