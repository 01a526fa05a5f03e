# SPDX-License-Identifier: Apache-2.0
"""The matrix product in registers against NumPy, and that it stays within its bounds."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from vllm_ext.gemm import COLUMNS, ROWS, add_product


@numba.njit
def _add_product(sums, left, inner, right):  # type: ignore[no-untyped-def]
    add_product(
        sums.ctypes.data,
        sums.strides[0],
        left.ctypes.data,
        left.strides[0],
        inner,
        right.ctypes.data,
    )


@pytest.mark.parametrize("inner", [1, 2, 3, 64, 100])
@pytest.mark.parametrize("more", [0, 5])
def test_adds_the_product_and_touches_nothing_else(inner: int, more: int) -> None:
    rng = np.random.default_rng(inner)
    sums = rng.standard_normal((ROWS + 1, COLUMNS + more)).astype(np.float32)
    left = rng.standard_normal((ROWS, inner + more)).astype(np.float32)
    right = rng.standard_normal((inner, COLUMNS + more)).astype(np.float32)
    expected = sums.astype(np.float64)
    expected[:ROWS, :COLUMNS] += left[:, :inner].astype(np.float64) @ right[:, :COLUMNS]
    untouched = sums[ROWS].copy(), sums[:, COLUMNS:].copy()
    _add_product(sums, left, inner, right)
    np.testing.assert_allclose(sums, expected, atol=1e-5)
    np.testing.assert_array_equal(sums[ROWS], untouched[0])
    np.testing.assert_array_equal(sums[:, COLUMNS:], untouched[1])
