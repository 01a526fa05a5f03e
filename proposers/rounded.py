# SPDX-License-Identifier: Apache-2.0
"""A matrix in 8 bits: what a product with one vector costs is reading the matrix.

Row i is stored as integers with one scale, W_i ~ s_i * W8_i with s_i = max |W_i| / 127, so that it
is a quarter of float32 and the product of a row differs by at most sum |x| * s_i / 2. Vectors and
sums stay float32.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class RoundedMatrix:
    """Holds `matrix`, float32 [R, C], in 8 bits per element.

    Attributes:
        values: int8 [R, C].
        scales: float32 [R].
    """

    def __init__(self, matrix: NDArray[np.float32]) -> None:
        largest = np.abs(matrix).max(axis=1)
        self.scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
        self.values = np.rint(matrix / self.scales[:, None]).astype(np.int8)

    def times(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """The product with each of N vectors, float32 [N, C], as float32 [N, R]."""
        product: NDArray[np.float32] = vectors @ self.values.T.astype(np.float32)
        return product * self.scales
