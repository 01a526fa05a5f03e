# SPDX-License-Identifier: Apache-2.0
"""The update of a recycling table: stored successors blended with fresh ones, the best kept.

    p(t | c) <- (1 - decay) * p(t | c) + decay * p_target(t)

`merge_topk` says what is computed. Where Numba is installed (it comes with vLLM) `merge_rows` does
the same compiled and in place: at these sizes NumPy spends its time on calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDTH = 8
"""Successors kept per context."""


def merge_topk(
    old_ids: NDArray[np.int32],
    old_probs: NDArray[np.float32],
    new_ids: NDArray[np.int32],
    new_probs: NDArray[np.float32],
    decay: float,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Blend R rows of stored successors with R rows of fresh ones and keep the best `WIDTH`.

    A probability of 0 marks an empty slot. Ties go to the fresh row, then to the lower column.

    Args:
        old_ids: int32 [R, WIDTH], distinct within a row where the probability is positive.
        old_probs: float32 [R, WIDTH].
        new_ids: int32 [R, K], distinct within a row where the probability is positive.
        new_probs: float32 [R, K].
        decay: weight of the fresh row, in (0, 1].

    Returns:
        int32 [R, WIDTH] and float32 [R, WIDTH], by falling probability.
    """
    rate = np.where(old_probs.any(axis=1, keepdims=True), np.float32(decay), np.float32(1.0))
    old = old_probs * (1 - rate)
    same = (new_ids[:, :, None] == old_ids[:, None, :]) & (new_probs > 0)[:, :, None]
    new = new_probs * rate + np.where(same, old[:, None, :], np.float32(0)).sum(axis=2)
    old[same.any(axis=1)] = 0.0
    ids = np.concatenate([new_ids, old_ids], axis=1)
    probs = np.concatenate([new, old], axis=1)
    order = np.argsort(-probs, axis=1, kind="stable")[:, :WIDTH]
    # Flat indices: np.take_along_axis costs more than the sort at these sizes.
    order += np.arange(0, probs.size, probs.shape[1])[:, None]
    return ids.ravel()[order], probs.ravel()[order]


def merge_rows(
    ids: NDArray[np.int32],
    probs: NDArray[np.float32],
    slots: NDArray[np.int64],
    rows: NDArray[np.int64],
    new_ids: NDArray[np.int64],
    new_probs: NDArray[np.float32],
    decay: float,
) -> None:
    """`merge_topk` of some rows of a table with some fresh rows, written to the table.

    Args:
        ids: int32 [capacity, WIDTH], changed in place.
        probs: float32 [capacity, WIDTH], changed in place.
        slots: int64 [R], distinct rows of the table.
        rows: int64 [R], rows of `new_ids` and `new_probs`.
        new_ids: int64 [N, K].
        new_probs: float32 [N, K].
        decay: as in `merge_topk`.
    """
    merge = compiled()
    if merge is None:
        ids[slots], probs[slots] = merge_topk(
            ids[slots], probs[slots], new_ids[rows].astype(np.int32), new_probs[rows], decay
        )
    else:
        fresh_ids = np.ascontiguousarray(new_ids, np.int64)
        merge(ids, probs, slots, rows, fresh_ids, np.ascontiguousarray(new_probs), decay)


@functools.cache
def compiled() -> Callable[..., None] | None:
    """The compiled merge, or `None` without Numba; the first call takes about two seconds."""
    try:
        import numba
    except ImportError:
        return None
    signature = "void(i4[:,::1], f4[:,::1], i8[::1], i8[::1], i8[:,::1], f4[:,::1], f8)"
    made: Callable[..., None] = numba.njit(signature)(_merge)
    return made


def _merge(
    ids: Any, probs: Any, slots: Any, rows: Any, new_ids: Any, new_probs: Any, decay: float
) -> None:
    width, fresh = ids.shape[1], new_ids.shape[1]
    tokens = np.empty(width + fresh, np.int32)
    shares = np.empty(width + fresh, np.float32)
    for r in range(len(slots)):
        slot, row = slots[r], rows[r]
        rate = np.float32(decay) if probs[slot].max() > 0 else np.float32(1.0)
        n = fresh
        for j in range(fresh):
            tokens[j] = new_ids[row, j]
            shares[j] = new_probs[row, j] * rate
        for j in range(width):
            old = probs[slot, j] * (np.float32(1.0) - rate)
            known = False
            for i in range(fresh):
                if new_probs[row, i] > 0 and tokens[i] == ids[slot, j]:
                    shares[i] += old
                    known = True
            if not known:
                tokens[n] = ids[slot, j]
                shares[n] = old
                n += 1
        # Insertion sort: stable, like the argsort of `merge_topk`, and quick on sorted pieces.
        for i in range(1, n):
            token, share, j = tokens[i], shares[i], i - 1
            while j >= 0 and shares[j] < share:
                tokens[j + 1], shares[j + 1] = tokens[j], shares[j]
                j -= 1
            tokens[j + 1], shares[j + 1] = token, share
        for j in range(width):
            ids[slot, j] = tokens[j] if j < n else 0
            probs[slot, j] = shares[j] if j < n else 0.0
