# SPDX-License-Identifier: Apache-2.0
"""Elementwise functions of rows as long as a vocabulary.

torch's float64 exponential and logarithm are vectorised everywhere, NumPy's only with AVX-512;
on short arrays NumPy has the smaller overhead.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

_LONG = 2048


def exp_(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Replace ``values`` by their exponentials, in place, and return them."""
    if values.size < _LONG:
        return np.exp(values, out=values)
    torch.from_numpy(values).exp_()
    return values


def log_(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Replace ``values`` by their logarithms, in place, and return them."""
    if values.size < _LONG:
        return np.log(values, out=values)
    torch.from_numpy(values).log_()
    return values
