# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_ext.distill.data import DataSettings, load, make
from vllm_ext.distill.texts import Texts

SETTINGS = DataSettings(length=12, rows=3, answer=5, top_k=4, seed=0)
PASSAGE = list(range(100, 137))
TEXTS = Texts([[5, 6, 7], [8, 9]], [PASSAGE], [], 0)


def ticking() -> Callable[[], float]:
    calls = itertools.count()
    return lambda: float(next(calls))


def made(target: Any, folder: Path, budget: float, texts: Texts = TEXTS) -> float:
    return make(target, texts, [1], folder, SETTINGS, budget, ticking(), lambda s, doing: None)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_batches_until_the_time_is_over(target: Any, tmp_path: Path) -> None:
    spent = made(target, tmp_path, budget=40.0)
    data = load(tmp_path)
    # Half of one more would not fit, half of the last one did.
    count = len(names(tmp_path))
    assert spent * (1 - 0.5 / count) < 40 <= spent * (1 + 0.5 / count)
    assert len(names(tmp_path)) * SETTINGS.rows == len(data.tokens)
    assert data.ids.shape == (*data.tokens.shape, 4)
    assert made(target, tmp_path / "none", budget=0.0) > 0
    assert len(names(tmp_path / "none")) == 1


def test_every_fourth_batch_is_read(target: Any, tmp_path: Path) -> None:
    made(target, tmp_path, budget=100.0)
    tokens = load(tmp_path).tokens
    assert tokens[9:12].flatten().tolist() == PASSAGE[:36]
    assert (tokens[:9, 0] < 10).all()
    # There is no other page: the eighth is written.
    assert len(tokens) >= 24
    assert (tokens[21:24, 0] < 10).all()


def test_killed_and_started_again_it_makes_the_same(target: Any, tmp_path: Path) -> None:
    spent = made(target, tmp_path / "whole", budget=40.0)
    made(target, tmp_path / "cut", budget=20.0)
    assert len(names(tmp_path / "cut")) < len(names(tmp_path / "whole"))
    (tmp_path / "cut" / "batch-000099.part").write_bytes(b"half a batch")
    assert made(target, tmp_path / "cut", budget=40.0) == spent
    whole, cut = load(tmp_path / "whole"), load(tmp_path / "cut")
    for name in ("tokens", "ids", "probs"):
        assert torch.equal(getattr(whole, name), getattr(cut, name))


def test_batches_differ(target: Any, tmp_path: Path) -> None:
    made(target, tmp_path, budget=30.0)
    tokens = load(tmp_path).tokens
    assert not torch.equal(tokens[:3], tokens[3:6])
