# SPDX-License-Identifier: Apache-2.0
"""The matrix products in registers against NumPy, and that they stay within their bounds."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from numpy.typing import NDArray

from vllm_ext.gemm import COLUMNS, PAIRS, ROWS, add_pairs_product, add_product


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


@numba.njit
def _add_pairs_product(sums, left, inner, right):  # type: ignore[no-untyped-def]
    add_pairs_product(
        sums.ctypes.data,
        sums.strides[0],
        left.ctypes.data,
        left.strides[0],
        inner,
        right.ctypes.data,
    )


def _pairs(numbers: NDArray[np.float32]) -> tuple[NDArray[np.uint32], NDArray[np.float64]]:
    """Float32 [rows, inner, 2] as bits of pairs of bfloat16 [rows, inner], and their values."""
    bits = numbers.view(np.uint32) >> 16
    return bits[..., 0] | bits[..., 1] << 16, (bits << 16).view(np.float32).astype(np.float64)


@pytest.mark.skipif(not PAIRS, reason="the processor has no products of pairs of bfloat16")
@pytest.mark.parametrize("inner", [1, 2, 3, 32, 50])
@pytest.mark.parametrize("more", [0, 5])
def test_adds_the_product_of_pairs(inner: int, more: int) -> None:
    rng = np.random.default_rng(inner)
    sums = rng.standard_normal((ROWS + 1, COLUMNS + more)).astype(np.float32)
    left, of_left = _pairs(rng.standard_normal((ROWS, inner + more, 2)).astype(np.float32))
    right, of_right = _pairs(rng.standard_normal((inner, COLUMNS + more, 2)).astype(np.float32))
    expected = sums.astype(np.float64)
    expected[:ROWS, :COLUMNS] += np.einsum("mkp,knp->mn", of_left[:, :inner], of_right[:, :COLUMNS])
    untouched = sums[ROWS].copy(), sums[:, COLUMNS:].copy()
    _add_pairs_product(sums, left, inner, right)
    np.testing.assert_allclose(sums, expected, atol=1e-5)
    np.testing.assert_array_equal(sums[ROWS], untouched[0])
    np.testing.assert_array_equal(sums[:, COLUMNS:], untouched[1])
