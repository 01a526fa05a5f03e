# SPDX-License-Identifier: Apache-2.0
"""Tree attention of one request on one core, by matrix tiles (AMX).

The algorithm is that of `cpu_kernel`, FlashAttention's online softmax (arXiv 2205.14135) over tiles
of ``TILE`` slots, and its precision that of vLLM's kernel on such machines: keys, values, queries
and softmax weights are bfloat16, everything else is float32.

In the packing `layout.PAIRS`, 16 slots of 32 dimensions of a key are one tile register, and so are
32 slots of 16 dimensions of a value: both are multiplied where they lie in the cache.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from vllm_ext import amx
from vllm_ext.attention.cpu_kernel import HEADROOM, MASKED, TILE, first_slot, hide
from vllm_ext.compiled import ONE, ZERO, compiled, exp, highest_of, nearest_bfloat16, wide_vectors

if not amx.supported():
    raise ImportError("this process may not use the processor's matrix tiles (AMX)")

clear, load, multiply, store = amx.clear, amx.load, amx.multiply, amx.store
configure, release = amx.configure, amx.release

_STRIP = amx.ROWS
_BYTES = amx.ROW_BYTES
_TILE_BYTES = amx.ROWS * amx.ROW_BYTES
_SCORE_BYTES = 4 * TILE
_WEIGHT_BYTES = 2 * TILE


@compiled
def _soften(weights: Any, scores: Any, start: int, scale: Any, top: Any) -> Any:
    """Softmax weights ``exp(scale * score - top)`` of ``TILE`` scores, rounded; their sum before.

    Args:
        weights: uint16 [...], bits of bfloat16, written from ``start`` on.
        scores: float32 [...], read from there.
        start: of the row.
        scale: float32.
        top: float32, no less than the largest scaled score.
    """
    wide_vectors()
    first = np.uintp(start)
    total = ZERO
    for j in range(np.uintp(TILE)):
        weight = exp(scores[first + j] * scale - top)
        total += weight
        weights[first + j] = nearest_bfloat16(weight)
    return total


@compiled
def _scores(to: int, query: int, head_size: int, keys: Any, groups: int) -> None:
    """Products of a strip of queries with the keys of up to 64 slots.

    Args:
        to: address of float32 [16, TILE], of which 16 columns per group are written.
        query: address of bfloat16 [16, head_size].
        head_size: in thirty-twos.
        keys: int64 [4], addresses of groups of 16 slots.
        groups: how many, 1 to 4.
    """
    clear(0)
    clear(1)
    clear(2)
    clear(3)
    for k in range(head_size // 32):
        at = k * _TILE_BYTES
        load(4, query + k * _BYTES, 2 * head_size)
        load(6, keys[0] + at, _BYTES)
        multiply(0, 4, 6)
        if groups > 1:
            load(7, keys[1] + at, _BYTES)
            multiply(1, 4, 7)
        if groups > 2:
            load(6, keys[2] + at, _BYTES)
            multiply(2, 4, 6)
        if groups > 3:
            load(7, keys[3] + at, _BYTES)
            multiply(3, 4, 7)
    store(0, to, _SCORE_BYTES)
    store(1, to + _BYTES, _SCORE_BYTES)
    store(2, to + 2 * _BYTES, _SCORE_BYTES)
    store(3, to + 3 * _BYTES, _SCORE_BYTES)


@compiled
def _add_values(
    to: int, head_size: int, weights: int, values: Any, pitches: Any, halves: int
) -> None:
    """Add to the sums of a strip its weights times the values of up to 64 slots.

    Args:
        to: address of float32 [16, head_size].
        head_size: in thirty-twos.
        weights: address of bfloat16 [16, TILE].
        values: int64 [2], addresses of the first 16 dimensions of 32 slots.
        pitches: int64 [2], bytes from 16 dimensions to the next 16.
        halves: how many thirty-twos of slots, 1 or 2.
    """
    pitch = 4 * head_size
    load(4, weights, _WEIGHT_BYTES)
    if halves > 1:
        load(5, weights + _BYTES, _WEIGHT_BYTES)
    for d in range(0, head_size // 16, 2):
        at = to + d * _BYTES
        load(0, at, pitch)
        load(1, at + _BYTES, pitch)
        load(6, values[0] + d * pitches[0], _BYTES)
        multiply(0, 4, 6)
        load(7, values[0] + (d + 1) * pitches[0], _BYTES)
        multiply(1, 4, 7)
        if halves > 1:
            load(6, values[1] + d * pitches[1], _BYTES)
            multiply(0, 5, 6)
            load(7, values[1] + (d + 1) * pitches[1], _BYTES)
            multiply(1, 5, 7)
        store(0, at, pitch)
        store(1, at + _BYTES, pitch)


@compiled
def _pad(to: Any, values: Any, at: int, pitch: int, head_size: int, n: int) -> None:
    """Copy ``n`` slots of a half tile of values: slots that hold none may hold anything.

    Args:
        to: uint16 [head_size / 16, 16, 16, 2], whose other slots are set to zero.
        values: uint16, of one head of a block.
        at: where the first 16 dimensions of the slots begin.
        pitch: elements from 16 dimensions to the next 16.
        head_size: of a value.
        n: slots, below 32.
    """
    to[:] = np.uint16(0)
    for d in range(head_size // 16):
        for slot in range(n):
            for lane in range(16):
                place = at + d * pitch + slot // 2 * 32 + lane * 2 + slot % 2
                to[d, slot // 2, lane, slot % 2] = values[place]


@compiled
def attend(
    configuration: Any,
    query: Any,
    cache: Any,
    table: Any,
    base: int,
    visible: Any,
    depths: Any,
    first: int,
    window: int,
    scale: Any,
    out: Any,
) -> None:
    """Masked attention of one tree.

    Args:
        configuration: `amx.CONFIGURATION`; globals are copied into what is compiled.
        query: uint16 [rows, heads, head_size], bits of bfloat16; head_size in thirty-twos.
        cache: uint16 [blocks, kv_heads, 2, block_size * head_size], bits of bfloat16 packed as
            `layout.PAIRS`; block_size in thirty-twos.
        table: integers [blocks of the request].
        base: committed slots; every row sees them, as far as the window allows.
        visible: bool [size, size], the whole tree's.
        depths: int64 [size].
        first: tree row of the first query.
        window: sliding window in positions, or -1.
        scale: float32, of the scores.
        out: uint16 [rows, heads, head_size], bits of bfloat16, written.
    """
    wide_vectors()
    rows, heads, head_size = query.shape
    kv_heads = cache.shape[1]
    group = heads // kv_heads
    count = rows * group
    strips = (count + _STRIP - 1) // _STRIP
    block_size = cache.shape[3] // head_size
    total = base + visible.shape[0]
    begin = first_slot(base, depths[first], window)

    queries = np.zeros((strips * _STRIP, head_size), np.uint16)
    scores = np.empty(_STRIP * TILE, np.float32)
    weights = np.zeros(_STRIP * TILE, np.uint16)
    sums = np.empty((strips * _STRIP, head_size), np.float32)
    highest = np.empty(strips * _STRIP, np.float32)
    weight = np.empty(strips * _STRIP, np.float32)
    padded = np.zeros((head_size // 16, 16, 16, 2), np.uint16)
    key_at, value_at, pitches = np.zeros(4, np.int64), np.zeros(2, np.int64), np.zeros(2, np.int64)

    # Addresses once: a slice of an array is counted, atomically, wherever it is made.
    queries_at, sums_at = queries.ctypes.data, sums.ctypes.data
    scores_at, weights_at = scores.ctypes.data, weights.ctypes.data
    padded_at, cache_at = padded.ctypes.data, cache.ctypes.data
    # In bytes; the blocks of a cache may be parts of larger ones.
    block_bytes, head_bytes, half_bytes, _ = cache.strides

    configure(configuration.ctypes.data)
    for head in range(kv_heads):
        for m in range(count):
            queries[m] = query[m // group, head * group + m % group]
        sums[:] = ZERO
        highest[:] = MASKED
        weight[:] = ZERO
        for start in range(begin, total, TILE):
            n = min(TILE, total - start)
            groups, halves = (n + 15) // 16, (n + 31) // 32
            for i in range(groups):
                slot = start + 16 * i
                block = int(table[slot // block_size])
                keys_at = cache_at + block * block_bytes + head * head_bytes
                key_at[i] = keys_at + slot % block_size * head_size * 2
            for i in range(halves):
                slot = start + 32 * i
                block, offset = int(table[slot // block_size]), slot % block_size * 16
                if n - 32 * i >= 32:
                    values_at = cache_at + block * block_bytes + head * head_bytes + half_bytes
                    value_at[i] = values_at + 2 * offset
                    pitches[i] = block_size * 32
                else:
                    values = cache[block, head, 1]
                    _pad(padded, values, offset, block_size * 16, head_size, n - 32 * i)
                    value_at[i] = padded_at
                    pitches[i] = _TILE_BYTES
            for strip in range(0, count, _STRIP):
                query_at = queries_at + strip * head_size * 2
                _scores(scores_at, query_at, head_size, key_at, groups)
                for m in range(strip, min(strip + _STRIP, count)):
                    row = (m - strip) * TILE
                    if start + n > base or window >= 0:
                        node = first + m // group
                        hide(scores, row, node, base, visible, depths, window, start, n)
                    peak = highest_of(scores, row, TILE) * scale
                    if peak > highest[m]:
                        peak += HEADROOM
                        shrink = np.float32(math.exp(highest[m] - peak))
                        weight[m] *= shrink
                        sums[m] *= shrink
                        highest[m] = peak
                    weight[m] += _soften(weights, scores, row, scale, highest[m])
                sum_at = sums_at + strip * head_size * 4
                _add_values(sum_at, head_size, weights_at, value_at, pitches, halves)
        for m in range(count):
            scaling = ONE / weight[m]
            for d in range(head_size):
                bits = nearest_bfloat16(sums[m, d] * scaling)
                out[m // group, head * group + m % group, d] = bits
    release()


def tree_attention(
    query: torch.Tensor,
    cache: Any,
    placed: tuple[Any, ...],
    window: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    """`attend` on the engine's tensors; a `cpu.Kernel`."""
    attend(
        amx.CONFIGURATION,
        query.contiguous().view(torch.uint16).numpy(),
        cache,
        *placed,
        window,
        np.float32(scale),
        out.view(torch.uint16).numpy(),
    )
