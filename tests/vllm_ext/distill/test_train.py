# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_ext.distill.student import make_student
from vllm_ext.distill.teacher import Labelled, read
from vllm_ext.distill.train import Progress, TrainSettings, learning_rate, train

SETTINGS = TrainSettings(rate=3e-3, rows=2, others=32, seed=0, keep_every=4.0)


def ticking() -> Callable[[], float]:
    """Half a second per call, two calls per step."""
    calls = itertools.count()
    return lambda: next(calls) / 2


@pytest.fixture(scope="module")
def labelled(target: Any) -> Labelled:
    tokens = torch.randint(2, 258, (8, 24), generator=torch.Generator().manual_seed(0))
    return read(target, tokens, 16, 4)


def trained(
    target: Any,
    data: Labelled,
    checkpoint: Path,
    settings: TrainSettings = SETTINGS,
    budget: float = 15.0,
    advance: Callable[[float, Progress], None] = lambda seconds, state: None,
) -> tuple[Any, Progress]:
    student = make_student(target, [0, 2])
    return student, train(student, data, checkpoint, settings, budget, ticking(), advance)


def kl(target: Any, student: Any, data: Labelled) -> float:
    tokens = data.tokens.long()
    with torch.inference_mode():
        p, q = (model(tokens).logits.log_softmax(-1) for model in (target, student))
        return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("narrow", [False, True])
def test_training_lowers_the_kl(
    target: Any, labelled: Labelled, tmp_path: Path, narrow: bool
) -> None:
    before = kl(target, make_student(target, [0, 2]), labelled)
    settings = dataclasses.replace(SETTINGS, narrow=narrow)
    student, state = trained(target, labelled, tmp_path / "a.pt", settings)
    assert student.dtype == torch.float32
    assert kl(target, student, labelled) < 0.8 * before
    assert state.step == 30
    assert state.epochs == 30 * 2 / 8


def test_narrow_products_are_narrow(target: Any, labelled: Labelled, tmp_path: Path) -> None:
    """In the same steps, from the same weights, they come out a little different."""
    weights = []
    for narrow in (False, True, True):
        settings = dataclasses.replace(SETTINGS, narrow=narrow)
        path = tmp_path / f"{len(weights)}.pt"
        student, _ = trained(target, labelled, path, settings, budget=2.0)
        weights.append(student.model.norm.weight.detach())
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[0], weights[1])


def test_a_rate_of_zero_does_not(target: Any, labelled: Labelled, tmp_path: Path) -> None:
    before = kl(target, make_student(target, [0, 2]), labelled)
    still = dataclasses.replace(SETTINGS, rate=0.0)
    student, _ = trained(target, labelled, tmp_path / "a.pt", still)
    assert kl(target, student, labelled) == before


def test_what_is_shared_stays(target: Any, labelled: Labelled, tmp_path: Path) -> None:
    student, _ = trained(target, labelled, tmp_path / "a.pt", budget=2.0)
    assert torch.equal(student.model.embed_tokens.weight, target.model.embed_tokens.weight)
    assert torch.equal(student.lm_head.weight, target.lm_head.weight)
    assert not torch.equal(student.model.norm.weight, target.model.norm.weight)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", [3, 9, 20, 29])
def test_a_resumed_run_is_the_uninterrupted_one(
    target: Any, labelled: Labelled, tmp_path: Path, step: int
) -> None:
    whole, _ = trained(target, labelled, tmp_path / "whole.pt")

    def kill(seconds: float, state: Progress) -> None:
        if state.step == step:
            raise Killed

    with pytest.raises(Killed):
        trained(target, labelled, tmp_path / "cut.pt", advance=kill)
    # A checkpoint was kept after eight steps, for the first time.
    assert (tmp_path / "cut.pt").exists() == (step > 8)
    taken: list[int] = []
    resumed, state = trained(
        target, labelled, tmp_path / "cut.pt", advance=lambda s, now: taken.append(now.step)
    )
    assert state.step == 30
    assert taken[0] == (1 if step == 3 else step // 8 * 8)
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_forgotten_optimizer_would_show(target: Any, labelled: Labelled, tmp_path: Path) -> None:
    """The equality above can fail: weights alone are not enough to resume."""
    whole, _ = trained(target, labelled, tmp_path / "whole.pt")

    def kill(seconds: float, state: Progress) -> None:
        if state.step == 9:
            raise Killed

    with pytest.raises(Killed):
        trained(target, labelled, tmp_path / "cut.pt", advance=kill)
    found = torch.load(tmp_path / "cut.pt", weights_only=True)
    found["optimizer"]["state"] = {}
    torch.save(found, tmp_path / "cut.pt")
    resumed, _ = trained(target, labelled, tmp_path / "cut.pt")
    assert any(
        not torch.equal(ours, theirs)
        for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True)
    )


def test_a_finished_training_is_not_repeated(
    target: Any, labelled: Labelled, tmp_path: Path
) -> None:
    first, _ = trained(target, labelled, tmp_path / "a.pt")
    kept = (tmp_path / "a.pt").read_bytes()
    again, state = trained(target, labelled, tmp_path / "a.pt")
    assert state.step == 30
    assert (tmp_path / "a.pt").read_bytes() == kept
    assert all(map(torch.equal, first.parameters(), again.parameters()))


def test_learning_rate() -> None:
    rates = [learning_rate(2.0, progress, 0.1) for progress in (0.0, 0.05, 0.1, 0.55, 1.0, 1.3)]
    assert rates == pytest.approx([0.0, 1.0, 2.0, 1.0, 0.0, 0.0])
