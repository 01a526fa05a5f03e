# SPDX-License-Identifier: Apache-2.0
"""Numerical pieces that Numba compiles; shared by the kernels of the CPU engine.

Import it lazily: Numba may be missing, and importing it takes a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

ONE = np.float32(1.0)
ZERO = np.float32(0.0)
LOWEST = np.float32(-87.0)
"""Below it the result is no normal number; `exp` gives zero."""

_LEAST = np.int32(-(2**31))

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


@intrinsic
def wide_vectors(typing: Any) -> Any:
    """Let LLVM use the widest vectors there are in the function that calls this.

    For processors with AVX-512 it prefers half of that, because of the clock of the first ones.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), code


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
    wide_vectors()
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


@intrinsic
def bits_of(typing: Any, number: Any) -> Any:
    """The bits of a float32, uint32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), code


@intrinsic
def number_of(typing: Any, bits: Any) -> Any:
    """The float32 of some bits, int32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), code


@compiled
def nearest_bfloat16(number: Any) -> Any:
    """The bits of the bfloat16 nearest to a float32, of two the even one (uint16)."""
    bits = bits_of(number)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16)


@compiled
def highest_of(values: Any, start: int, n: int) -> Any:
    """The largest of ``n`` float32 from ``start`` on.

    As integers in the same order: LLVM vectorises their maximum, and not that of floats.
    """
    wide_vectors()
    first = np.uintp(start)
    top = _LEAST
    for j in range(np.uintp(n)):
        top = max(top, _ordered(np.int32(bits_of(values[first + j]))))
    return number_of(_ordered(top))


@compiled
def _ordered(bits: Any) -> Any:
    """Bits of a float32 to an integer that is larger where the number is, and back (int32)."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@compiled
def exp(x: Any) -> Any:
    """``e**x`` of a float32 that is not positive, with a relative error below 4e-7."""
    y = max(x, LOWEST)
    k = np.int32(y * _LOG2_E - _HALF)  # truncation rounds to nearest: y is not positive
    r = y - np.float32(k) * _LN2_HIGH - np.float32(k) * _LN2_LOW
    p = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
    power = number_of(np.int32((k + np.int32(127)) << np.int32(23)))  # the bits of 2^k
    return (p * r * r + r + ONE) * power if x > LOWEST else ZERO


@compiled
def exponentiate(values: Any, start: int, n: int, highest: Any) -> Any:
    """Replace ``n`` values from ``start`` on by ``exp(value - highest)`` and return their sum.

    Args:
        values: float32 [...].
        start: first of the values.
        n: how many.
        highest: float32, no less than any of them.
    """
    wide_vectors()
    first = np.uintp(start)
    total = ZERO
    for j in range(np.uintp(n)):
        power = exp(values[first + j] - highest)
        values[first + j] = power
        total += power
    return total
