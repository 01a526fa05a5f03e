# SPDX-License-Identifier: Apache-2.0
"""The compiled merge does what the NumPy one does, which test_recycling checks by its meaning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proposers import merging
from proposers.merging import WIDTH, merge_rows

CAPACITY = 12


def state(seed: int, fresh: int) -> dict[str, Any]:
    """A partly filled table, and fresh rows with empty places and ties."""
    rng = np.random.default_rng(seed)

    def rows(count: int, width: int) -> tuple[Any, Any]:
        ids = np.stack([rng.permutation(20)[:width] for _ in range(count)])
        probs = -np.sort(-rng.integers(0, 4, (count, width)), axis=1) / np.float32(4 * width)
        return ids, probs.astype(np.float32)

    ids, probs = rows(CAPACITY, WIDTH)
    probs[rng.random(CAPACITY) < 0.3] = 0
    new_ids, new_probs = rows(9, fresh)
    return {
        "ids": ids.astype(np.int32),
        "probs": probs,
        "slots": rng.permutation(CAPACITY)[:7].astype(np.int64),
        "rows": rng.integers(0, 9, 7),
        "new_ids": new_ids,
        "new_probs": new_probs,
    }


def successors(table: dict[str, Any]) -> list[list[tuple[int, float]]]:
    rows = zip(table["ids"].tolist(), table["probs"].tolist(), strict=True)
    return [[(token, round(p, 5)) for token, p in zip(*row, strict=True) if p > 0] for row in rows]


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 8, 11]), st.sampled_from([0.1, 0.5, 1.0]))
def test_compiled_and_numpy_agree(seed: int, fresh: int, decay: float) -> None:
    pytest.importorskip("numba")
    compiled, plain, untouched = (state(seed, fresh) for _ in range(3))
    merge_rows(**compiled, decay=decay)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "compiled", lambda: None)
        merge_rows(**plain, decay=decay)
    assert successors(compiled) == successors(plain)
    others = np.setdiff1d(np.arange(CAPACITY), compiled["slots"])
    assert (compiled["ids"][others] == untouched["ids"][others]).all()
    assert (compiled["probs"][others] == untouched["probs"][others]).all()


def test_it_can_tell_the_decay() -> None:
    """Negative control of the test above."""
    a, b = state(3, 8), state(3, 8)
    merge_rows(**a, decay=0.5)
    merge_rows(**b, decay=0.4)
    assert successors(a) != successors(b)


def test_without_numba_it_works_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "numba", None)
    merging.compiled.cache_clear()
    try:
        assert merging.compiled() is None
        table = state(1, 8)
        merge_rows(**table, decay=0.5)
        assert successors(table) != successors(state(1, 8))
    finally:
        merging.compiled.cache_clear()
