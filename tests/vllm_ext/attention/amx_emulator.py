# SPDX-License-Identifier: Apache-2.0
"""Runs pytest with Intel's matrix tiles emulated in NumPy, on a processor that may have none.

With ``NUMBA_DISABLE_JIT=1`` the kernel is plain Python, so its index arithmetic, masks and softmax
run as they are; only the eight tile instructions, and the pieces that exist in compiled code alone,
are replaced. Each does what Intel's manual says of the instruction.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vllm_ext import amx, compiled

_TILES = np.zeros((8, amx.ROWS, amx.ROW_BYTES), np.uint8)


def _rows(address: int, stride: int) -> list[NDArray[np.uint8]]:
    row = ctypes.c_uint8 * amx.ROW_BYTES
    starts = [int(address) + r * int(stride) for r in range(amx.ROWS)]
    return [np.frombuffer(row.from_address(start), np.uint8) for start in starts]


def _load(tile: int, address: int, stride: int) -> None:
    for to, row in zip(_TILES[tile], _rows(address, stride), strict=True):
        to[:] = row


def _store(tile: int, address: int, stride: int) -> None:
    for row, of in zip(_rows(address, stride), _TILES[tile], strict=True):
        row[:] = of


def _clear(tile: int) -> None:
    _TILES[tile] = 0


def _multiply(total: int, left: int, right: int) -> None:
    def numbers(tile: int) -> NDArray[np.float32]:
        return (_TILES[tile].view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    pairs = numbers(right).reshape(16, 16, 2)
    sums = _TILES[total].view(np.float32)
    sums += np.einsum("mkp,knp->mn", numbers(left).reshape(16, 16, 2), pairs)


def _bits_of(number: Any) -> Any:
    return np.float32(number).view(np.uint32)


def _number_of(bits: Any) -> Any:
    return np.int32(bits).view(np.float32)


def _nothing(*args: Any) -> None: ...


def emulate() -> None:
    """Replace what Numba would compile to instructions."""
    replaced: dict[Any, dict[str, Any]] = {
        amx: {
            "supported": lambda: True,
            "configure": _nothing,
            "release": _nothing,
            "clear": _clear,
            "load": _load,
            "store": _store,
            "multiply": _multiply,
        },
        compiled: {"bits_of": _bits_of, "number_of": _number_of, "wide_vectors": _nothing},
    }
    for module, members in replaced.items():
        for name, member in members.items():
            assert hasattr(module, name)
            setattr(module, name, member)


if __name__ == "__main__":
    assert os.environ.get("NUMBA_DISABLE_JIT") == "1"
    emulate()
    sys.exit(pytest.main(sys.argv[1:]))
