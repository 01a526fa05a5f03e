# SPDX-License-Identifier: Apache-2.0
"""Small matrix products whose sums stay in registers, for code that Numba compiles.

The micro-kernel of Goto and van de Geijn, *Anatomy of High-Performance Matrix Multiplication* (ACM
TOMS 34(3), 2008): ``ROWS`` rows times ``COLUMNS`` columns of sums are loaded once, take a column of
the left matrix times a row of the right one (an outer product) at every step, and are stored once.
LLVM makes no such loop of plain ones, so it is written in its vectors.

Import it lazily; see `compiled`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import config, types
from numba.extending import intrinsic


def _compiles_for(feature: str) -> bool:
    chosen = config.CPU_FEATURES  # by the user, in place of the processor's own
    if chosen is not None:
        return f"+{feature}" in chosen.split(",")
    return bool(binding.get_host_cpu_features().get(feature))


ROWS = 4
_WIDTH = 16
COLUMNS = 4 * _WIDTH if _compiles_for("avx512f") else _WIDTH
"""Columns of one call: with 32 registers of 16 numbers 4 x 4 of them, else 4 x 1 (two halves)."""

PAIRS = (
    _compiles_for("avx512f")
    and _compiles_for("avx512bf16")
    and binding.llvm_version_info >= (17,)  # before, the types of the instruction were others
)
"""Whether there are products of pairs of bfloat16."""

_FLOAT = ir.FloatType()
_SUMS = ir.VectorType(_FLOAT, _WIDTH)
_INT32 = ir.IntType(32)
_INT64 = ir.IntType(64)
_FAST = ("contract", "nsz", "reassoc")


@intrinsic
def add_product(
    typing: Any, sums: Any, pitch: Any, left: Any, left_pitch: Any, inner: Any, right: Any
) -> Any:
    """``sums [ROWS, COLUMNS] += left [ROWS, inner] @ right [inner, COLUMNS]``, float32.

    Args:
        sums: address; rows are ``pitch`` bytes apart.
        pitch: of the sums and of the right matrix.
        left: address; rows are ``left_pitch`` bytes apart.
        left_pitch: see there.
        inner: at least 1.
        right: address.
    """
    return types.void(*(types.int64,) * 6), _outer_products(_FLOAT, _add_scaled)


@intrinsic
def add_pairs_product(
    typing: Any, sums: Any, pitch: Any, left: Any, left_pitch: Any, inner: Any, right: Any
) -> Any:
    """As `add_product`, the matrices of pairs of bfloat16: a sum gets both products, in float32.

    Instruction VDPBF16PS of Intel's Software Developer's Manual; needs `PAIRS`.
    """
    return types.void(*(types.int64,) * 6), _outer_products(_INT32, _add_pairs)


def _add_scaled(builder: Any, total: Any, factor: Any, column: Any) -> Any:
    return builder.fadd(total, builder.fmul(factor, column, flags=_FAST), flags=_FAST)


def _add_pairs(builder: Any, total: Any, factor: Any, column: Any) -> Any:
    name, pairs = "llvm.x86.avx512bf16.dpbf16ps.512", ir.VectorType(_BFloat(), 2 * _WIDTH)
    function = builder.module.globals.get(name)
    if function is None:
        kind = ir.FunctionType(_SUMS, [_SUMS, pairs, pairs])
        function = ir.Function(builder.module, kind, name)
    return builder.call(
        function, [total, builder.bitcast(factor, pairs), builder.bitcast(column, pairs)]
    )


class _BFloat(ir.Type):
    """LLVM's ``bfloat``, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def _outer_products(kind: Any, add: Callable[..., Any]) -> Callable[..., Any]:
    """Code that adds the outer products of 32-bit elements of a kind to sums of float32."""
    vector = ir.VectorType(kind, _WIDTH)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, pitch, left, left_pitch, inner, right = arguments
        parts = COLUMNS // _WIDTH
        at = [
            builder.add(
                builder.add(sums, builder.mul(pitch, ir.Constant(_INT64, row))),
                ir.Constant(_INT64, part * 4 * _WIDTH),
            )
            for row in range(ROWS)
            for part in range(parts)
        ]
        before = [_load(builder, _SUMS, address) for address in at]
        entry = builder.block
        loop, done = builder.append_basic_block("inner"), builder.append_basic_block("summed")
        builder.branch(loop)

        builder.position_at_end(loop)
        step, left_at, right_at = (builder.phi(_INT64) for _ in range(3))
        totals = [builder.phi(_SUMS) for _ in at]
        columns = [
            _load(builder, vector, builder.add(right_at, ir.Constant(_INT64, part * 4 * _WIDTH)))
            for part in range(parts)
        ]
        after = []
        for row in range(ROWS):
            place = builder.add(left_at, builder.mul(left_pitch, ir.Constant(_INT64, row)))
            factor = _spread(builder, vector, _load(builder, kind, place))
            for part in range(parts):
                after.append(add(builder, totals[row * parts + part], factor, columns[part]))
        next_step = builder.add(step, ir.Constant(_INT64, 1))
        moved = [
            (step, ir.Constant(_INT64, 0), next_step),
            (left_at, left, builder.add(left_at, ir.Constant(_INT64, 4))),
            (right_at, right, builder.add(right_at, pitch)),
            *zip(totals, before, after, strict=True),
        ]
        for phi, first, following in moved:
            phi.add_incoming(first, entry)
            phi.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", next_step, inner), loop, done)

        builder.position_at_end(done)
        for address, total in zip(at, after, strict=True):
            builder.store(total, builder.inttoptr(address, _SUMS.as_pointer()), align=4)
        return context.get_dummy_value()

    return code


def _load(builder: Any, kind: Any, address: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)


def _spread(builder: Any, vector: Any, number: Any) -> Any:
    """A vector of one number."""
    nothing = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(nothing, number, ir.Constant(ir.IntType(32), 0))
    lanes = ir.Constant(ir.VectorType(_INT32, _WIDTH), [0] * _WIDTH)
    return builder.shuffle_vector(first, nothing, lanes)
