# SPDX-License-Identifier: Apache-2.0
"""The replay of a cascade, counted by hand."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def cascade(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("cascade")
    sys.modules.pop("cascade", None)


def guesses(cascade: ModuleType, sure: list[float], right: list[int]) -> Any:
    return cascade.Guesses(np.array(sure), np.array(right, np.float64))


@pytest.fixture
def costs(cascade: ModuleType) -> Any:
    return cascade.Costs(1.0, 10.0, tuple(100.0 + rows for rows in range(cascade.MOST + 1)))


def test_a_curve_as_the_engine_logs_it(cascade: ModuleType) -> None:
    found = cascade.logged("1: 20.0, 3: 24.0, 16: 50.0")
    assert len(found) == cascade.MOST + 1
    assert found[:4] == pytest.approx((20, 22, 24, 26))
    with pytest.raises(ValueError, match="unpack"):
        cascade.logged("20.0")


def test_by_hand(cascade: ModuleType, costs: Any) -> None:
    small = guesses(cascade, [0.9, 0.3, 0.9, 0.9], [1, 0, 1, 1])
    large = guesses(cascade, [0.8, 0.8, 0.8, 0.8], [1, 1, 1, 1])
    replay = cascade.replay
    # Three drafted, the second wrong: two tokens; then one, which is right: two tokens.
    assert replay(small, large, "small", 0.0, 0.1, costs) == (3 + 103 + 1 + 101, 2)
    # Three drafted and right, and the target's own.
    assert replay(small, large, "large", 0.0, 0.1, costs) == (30 + 103, 1)
    assert replay(small, large, "cascade", 0.5, 0.1, costs) == (3 + 10 + 103, 1)
    assert replay(small, large, "oracle", 0.0, 0.1, costs) == (3 + 10 + 103, 1)
    # The chain ends at an unsure token, which is not verified.
    assert replay(small, large, "small", 0.0, 0.5, costs) == (2 + 101 + 1 + 101, 2)
    # Never drafting is plain decoding.
    assert replay(small, large, "small", 0.0, 1.01, costs) == (400, 4)


def test_the_better_policy_is_found(cascade: ModuleType, costs: Any) -> None:
    """A small draft that knows when it is wrong makes the cascade pay; one that does not, not."""
    generator = np.random.default_rng(0)
    for knows in (True, False):
        texts = []
        for _ in range(12):
            right = generator.random(60) < 0.6
            sure = np.where(right, 0.95, 0.1) if knows else np.full(60, 0.6)
            small = cascade.Guesses(sure, right.astype(np.float64))
            large = cascade.Guesses(np.full(60, 0.9), (generator.random(60) < 0.9).astype(float))
            texts.append((small, large))
        found = cascade.judge(texts, costs)
        best = max(found["small"]["ratio"], found["large"]["ratio"])
        assert (found["cascade"]["ratio"] > 1.02 * best) == knows
        assert found["oracle"]["ratio"] > best
