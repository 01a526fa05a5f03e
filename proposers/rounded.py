# SPDX-License-Identifier: Apache-2.0
"""A matrix in 8 bits: what a product with one vector costs is reading the matrix.

Row i is stored as integers with one scale, W_i ~ s_i * W8_i with s_i = max |W_i| / 127, so that it
is a quarter of float32 and the product of a row differs by at most sum |x| * s_i / 2. Vectors and
sums stay float32. Where Numba is installed (it comes with vLLM) the product is compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray


class RoundedMatrix:
    """Holds `matrix`, float32 [R, C], in 8 bits per element."""

    def __init__(self, matrix: NDArray[np.float32]) -> None:
        largest = np.abs(matrix).max(axis=1)
        self._scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
        self._values = np.rint(matrix / self._scales[:, None]).astype(np.int8)
        compiled()  # now, and not in the first product

    def times(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """The product with each of N vectors, float32 [N, C], as float32 [N, R]."""
        multiply = compiled()
        if multiply is None:
            plain: NDArray[np.float32] = vectors @ self._values.T.astype(np.float32)
            return plain * self._scales
        product = np.empty((len(vectors), len(self._values)), np.float32)
        multiply(self._values, self._scales, np.ascontiguousarray(vectors), product)
        return product


@functools.cache
def compiled() -> Callable[..., None] | None:
    """The compiled product, or `None` without Numba; the first call takes about a second."""
    try:
        import numba
    except ImportError:
        return None
    # Sums may be reordered, so that they vectorise; every machine then has an order of its own.
    fast = {"contract", "nsz", "reassoc"}
    signature = "void(i1[:,::1], f4[::1], f4[:,::1], f4[:,::1])"
    made: Callable[..., None] = numba.njit(signature, fastmath=fast)(_multiply)
    return made


def _multiply(values: Any, scales: Any, vectors: Any, product: Any) -> None:
    for i in range(values.shape[0]):
        row, scale = values[i], scales[i]
        for n in range(vectors.shape[0]):
            vector = vectors[n]
            total = np.float32(0)
            for k in range(row.shape[0]):
                total += np.float32(row[k]) * vector[k]
            product[n, i] = total * scale
