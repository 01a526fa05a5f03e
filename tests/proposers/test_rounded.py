# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from proposers.rounded import RoundedMatrix


def drawn(rows: int, columns: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(rows, columns)) * rng.uniform(0.01, 5, size=(rows, 1))
    matrix[0] = 0.0
    return matrix.astype(np.float32), rng.normal(size=(count, columns)).astype(np.float32)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 5), st.integers(0, 10**6))
def test_a_product_is_as_exact_as_eight_bits_allow(
    rows: int, columns: int, count: int, seed: int
) -> None:
    matrix, vectors = drawn(rows, columns, count, seed)
    found = RoundedMatrix(matrix).times(vectors)
    assert (found.shape, found.dtype) == ((count, rows), np.float32)
    scales = np.abs(matrix).max(axis=1) / 127
    allowed = np.abs(vectors).sum(axis=1)[:, None] * scales / 2
    assert (np.abs(found - vectors @ matrix.T) <= allowed * 1.001 + 1e-4).all()
    assert (found[:, 0] == 0).all()
