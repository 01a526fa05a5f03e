# SPDX-License-Identifier: Apache-2.0
"""Intel's matrix tiles (AMX) in code that Numba compiles.

A tile register holds 16 rows of 64 bytes. `multiply` adds to a tile of 16 x 16 float32 the product
of a tile of 16 x 32 bfloat16 and one of 32 x 16, in which two rows lie interleaved as pairs:
instruction TDPBF16PS of Intel's Software Developer's Manual.

Import it lazily, and call `supported` before anything else is run: without the operating system's
permission, which torch asks for, the first tile instruction kills the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

ROWS = 16
ROW_BYTES = 64

_BYTE = ir.IntType(8)
_POINTER = ir.PointerType(_BYTE)

CONFIGURATION = np.zeros(64, np.uint8)
"""All eight tiles with 16 rows of 64 bytes, for `configure`."""
CONFIGURATION[0] = 1
CONFIGURATION[16:32].view(np.uint16)[:] = ROW_BYTES
CONFIGURATION[48:56] = ROWS


def supported() -> bool:
    """Whether this process may use tiles of bfloat16; asks the operating system for them."""
    try:
        return bool(torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx())
    except AttributeError:  # another torch, or not x86
        return False


def _call(builder: Any, name: str, arguments: Sequence[Any]) -> None:
    function = builder.module.globals.get(name)
    if function is None:
        kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
        function = ir.Function(builder.module, kind, name)
    builder.call(function, arguments)


def _tile(kind: Any) -> Any:
    """A tile number, which is part of the instruction."""
    return ir.Constant(_BYTE, kind.literal_value)


@intrinsic
def configure(typing: Any, address: Any) -> Any:
    """Load the shapes of the tiles from ``address``, that of `CONFIGURATION`."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "llvm.x86.ldtilecfg", [builder.inttoptr(arguments[0], _POINTER)])
        return context.get_dummy_value()

    return types.void(types.int64), code


@intrinsic
def release(typing: Any) -> Any:
    """Give the tiles back; what they held is lost."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "llvm.x86.tilerelease", [])
        return context.get_dummy_value()

    return types.void(), code


@intrinsic(prefer_literal=True)
def clear(typing: Any, tile: Any) -> Any:
    """Set a tile to zero."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "llvm.x86.tilezero", [_tile(tile)])
        return context.get_dummy_value()

    return types.void(tile), code


@intrinsic(prefer_literal=True)
def load(typing: Any, tile: Any, address: Any, stride: Any) -> Any:
    """Load a tile whose rows are ``stride`` bytes apart from ``address`` on."""
    return _moved("llvm.x86.tileloadd64", tile)


@intrinsic(prefer_literal=True)
def store(typing: Any, tile: Any, address: Any, stride: Any) -> Any:
    """Store a tile; see `load`."""
    return _moved("llvm.x86.tilestored64", tile)


def _moved(name: str, tile: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[1], _POINTER)
        _call(builder, name, [_tile(tile), pointer, arguments[2]])
        return context.get_dummy_value()

    return types.void(tile, types.int64, types.int64), code


@intrinsic(prefer_literal=True)
def multiply(typing: Any, total: Any, left: Any, right: Any) -> Any:
    """Add the product of two tiles of bfloat16 to a third one."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "llvm.x86.tdpbf16ps", [_tile(total), _tile(left), _tile(right)])
        return context.get_dummy_value()

    return types.void(total, left, right), code
