# SPDX-License-Identifier: Apache-2.0
"""Numerical pieces that Numba compiles; shared by the kernels of the CPU engine.

Import it lazily: Numba may be missing, and importing it takes a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

ONE = np.float32(1.0)
ZERO = np.float32(0.0)
LOWEST = np.float32(-87.0)
"""Below it exp is no normal number; `exponentiate` gives zero."""

# exp(x) = 2^k exp(r), |r| <= ln(2) / 2; ln(2) in two parts; the polynomial is that of Cephes' expf.
_LOG2_E = np.float32(1.44269504088896341)
_HALF = np.float32(0.5)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_P0 = np.float32(1.9875691500e-4)
_P1 = np.float32(1.3981999507e-3)
_P2 = np.float32(8.3334519073e-3)
_P3 = np.float32(4.1665795894e-2)
_P4 = np.float32(1.6666665459e-1)
_P5 = np.float32(5.0000001201e-1)


def compiled(function: Callable[..., Any]) -> Any:
    """Compile on first call, keep the result on disk, release the interpreter lock."""
    # Sums may be reordered, so that they vectorise; infinities and NaN do not occur.
    fast = {"contract", "nsz", "arcp", "reassoc", "nnan"}
    return numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=fast)(function)


@compiled
def copy_bits(
    to: Any, to_start: int, to_pitch: int, of: Any, of_start: int, of_pitch: int, rows: int, n: int
) -> None:
    """Copy runs of elements as bits of float32; a bfloat16 is the upper half of one.

    Args:
        to: uint32 [...], written.
        to_start: where the first run goes.
        to_pitch: from run to run.
        of: uint32 or uint16 [...], the bits of float32 or bfloat16.
        of_start: where the first run is.
        of_pitch: from run to run.
        rows: runs.
        n: elements of each.
    """
    narrow = of.itemsize == 2
    for row in range(rows):
        # Unsigned, or Numba provides for negative indices and LLVM cannot vectorise.
        t, o = np.uintp(to_start + row * to_pitch), np.uintp(of_start + row * of_pitch)
        if narrow:
            for j in range(np.uintp(n)):
                to[t + j] = np.uint32(of[o + j]) << 16
        else:
            for j in range(np.uintp(n)):
                to[t + j] = of[o + j]


@compiled
def exponentiate(values: Any, highest: Any, powers: Any) -> Any:
    """Replace values by ``exp(value - highest)`` and return their sum.

    Args:
        values: float32 [n], none above `highest`.
        highest: float32.
        powers: int32 [n], scratch.
    """
    factors = powers.view(np.float32)
    n = len(values)
    for j in range(n):
        x = max(values[j] - highest, LOWEST)
        k = np.int32(x * _LOG2_E - _HALF)  # truncation rounds to nearest: x is not positive
        r = x - np.float32(k) * _LN2_HIGH - np.float32(k) * _LN2_LOW
        y = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
        values[j] = y * r * r + r + ONE if x > LOWEST else ZERO
        powers[j] = (k + np.int32(127)) << np.int32(23)  # the bits of 2^k
    total = ZERO
    for j in range(n):
        values[j] *= factors[j]
        total += values[j]
    return total
