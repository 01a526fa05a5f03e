# SPDX-License-Identifier: Apache-2.0
"""Tree attention of one request on one core, compiled by Numba.

Torch needs a dozen operators per layer for a tree, each of which copies the context or a part of
it. Here it is read once: in tiles of ``TILE`` slots that fit the first-level cache, with a running
maximum and normaliser (the online softmax of FlashAttention, arXiv 2205.14135),

    m' = max(m, max_j s_j),  l' = l e^(m - m') + sum_j e^(s_j - m'),
    o' = o e^(m - m') + sum_j e^(s_j - m') v_j,

in float32 whatever the dtype of the cache, as the stock kernel computes. Query heads that share a
key head are rows of the same small matrix products. Where the processor multiplies pairs of
bfloat16, queries and keys of that dtype are multiplied as they are, which loses nothing: such a
product is exact in float32.

Addresses are taken once: a slice of an array is counted, atomically, wherever it is made.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from vllm_ext.compiled import (
    ONE,
    ZERO,
    bits_of,
    compiled,
    copy_bits,
    exponentiate,
    highest_of,
    nearest_bfloat16,
    number_of,
    wide_vectors,
)
from vllm_ext.gemm import COLUMNS, PAIRS, ROWS, add_pairs_product, add_product

TILE = 64
"""Slots per tile, and columns of a head per accumulator."""

MASKED = np.float32(-1e30)

HEADROOM = np.float32(8.0)
"""How far the maximum that weights are relative to is put above the scores that raise it.  Any
maximum gives the same softmax; one seldom raised spares rescaling, and waiting for the scores'.
"""


@compiled
def _load_keys(
    to: Any, cache: Any, table: Any, head: int, head_size: int, start: int, n: int, pairs: bool
) -> None:
    """Read the keys of ``n`` slots from ``start`` on, for one key head.

    Args:
        to: written, bits of float32 [head_size, TILE], or of pairs [head_size / 2, TILE].
        cache: as in `attend`, as are the others.
        table: blocks of the request.
        head: key head.
        head_size: of a head.
        start: first slot.
        n: slots.
        pairs: of dimensions.
    """
    wide_vectors()
    block_size = cache.shape[3] // head_size
    done = 0
    while done < n:
        offset = (start + done) % block_size
        run = min(block_size - offset, n - done)
        keys = cache[table[(start + done) // block_size], head, 0]
        if not pairs:
            copy_bits(to, done, TILE, keys, offset, block_size, head_size, run)
        for d in range(head_size // 2 if pairs else 0):
            # Unsigned, or Numba provides for negative indices and LLVM cannot vectorise.
            at, low = np.uintp(d * TILE + done), np.uintp(2 * d * block_size + offset)
            high = low + np.uintp(block_size)
            for j in range(np.uintp(run)):
                to[at + j] = np.uint32(keys[low + j]) | (np.uint32(keys[high + j]) << 16)
        done += run


@compiled
def _load_values(
    to: Any, cache: Any, table: Any, head: int, head_size: int, start: int, n: int
) -> None:
    """As `_load_keys`, the values: ``to`` is bits of float32 [columns / TILE, TILE, TILE]."""
    block_size = cache.shape[3] // head_size
    done = 0
    while done < n:
        offset = (start + done) % block_size
        run = min(block_size - offset, n - done)
        values = cache[table[(start + done) // block_size], head, 1]
        for d in range(0, head_size, TILE):
            at, width = (d + done) * TILE, min(TILE, head_size - d)
            copy_bits(to, at, TILE, values, offset * head_size + d, head_size, run, width)
        done += run


@compiled
def _multiply(sums: int, left: int, pitch: int, inner: int, right: int) -> None:
    """``sums [ROWS, TILE] += left [ROWS, :inner] @ right [inner, TILE]``, given by addresses."""
    wide_vectors()
    for column in range(0, TILE, COLUMNS):
        at = 4 * column
        add_product(sums + at, 4 * TILE, left, 4 * pitch, inner, right + at)


@compiled
def _multiply_pairs(sums: int, left: int, pitch: int, inner: int, right: int) -> None:
    """As `_multiply`, the matrices of pairs of bfloat16."""
    wide_vectors()
    for column in range(0, TILE, COLUMNS):
        at = 4 * column
        add_pairs_product(sums + at, 4 * TILE, left, 4 * pitch, inner, right + at)


_multiply_scores = _multiply_pairs if PAIRS else _multiply  # else it would be compiled in vain


@compiled
def first_slot(base: int, depth: int, window: int) -> int:
    """Where the tiles begin that a tree's rows see, the first of which has this depth."""
    return max(0, (base + depth - window + 1) // TILE * TILE) if window >= 0 else 0


@compiled
def hide(
    scores: Any,
    at: int,
    row: int,
    base: int,
    visible: Any,
    depths: Any,
    window: int,
    start: int,
    n: int,
) -> None:
    """Hide from a tree row what it must not see of a tile.

    Args:
        scores: float32 [...], of which ``TILE`` from ``at`` on belong to the row.
        at: see there.
        row: of the tree.
        base: as in `attend`, as are visible, depths and window.
        visible: see there.
        depths: see there.
        window: see there.
        start: first slot of the tile.
        n: slots of the tile; of what is behind them nothing is seen.
    """
    # Unsigned, or Numba provides for negative indices and LLVM cannot vectorise.
    first, skip = np.uintp(at), np.uintp(max(0, base - start))
    seen, node = visible[row], np.uintp(max(0, start - base))
    for j in range(np.uintp(max(0, n - max(0, base - start)))):
        place = first + skip + j
        scores[place] = scores[place] if seen[node + j] else MASKED
    if window >= 0:  # in positions; slots of a tree are not its positions
        edge = base + depths[row] - window
        for j in range(n):
            slot = start + j
            position = slot if slot < base else base + depths[slot - base]
            if position <= edge:
                scores[at + j] = MASKED
    for j in range(n, TILE):
        scores[at + j] = MASKED


@compiled
def attend(
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
        query: [rows, heads, head_size], bits as those of the cache.
        cache: [blocks, kv_heads, 2, block_size * head_size], the bits of float32 (uint32) or
            bfloat16 (uint16); keys of a block are stored as [head_size, block_size], values as
            [block_size, head_size] (`layout.ROWS`).
        table: integers [blocks of the request].
        base: committed slots; every row sees them, as far as the window allows.
        visible: bool [size, size], the whole tree's.
        depths: int64 [size].
        first: tree row of the first query.
        window: sliding window in positions, or -1.
        scale: float32, of the scores.
        out: [rows, heads, head_size], bits as those of the query, written.
    """
    wide_vectors()
    rows, heads, head_size = query.shape
    kv_heads = cache.shape[1]
    group = heads // kv_heads
    count = rows * group
    widen = np.uint32(16 if query.itemsize == 2 else 0)
    strips = (count + ROWS - 1) // ROWS
    chunks = (head_size + TILE - 1) // TILE
    total = base + visible.shape[0]
    begin = first_slot(base, depths[first], window)

    pairs = PAIRS and query.itemsize == 2 and head_size % 2 == 0
    inner = head_size // 2 if pairs else head_size
    queries = np.zeros((strips * ROWS, inner), np.uint32)
    scores = np.zeros(strips * ROWS * TILE, np.float32)
    sums = np.empty((chunks, strips * ROWS, TILE), np.float32)
    highest = np.empty(strips * ROWS, np.float32)
    weight = np.empty(strips * ROWS, np.float32)
    # Keys, then values: with the rest they just fit the first-level cache.
    tile = np.zeros(chunks * TILE * TILE, np.uint32)
    queries_at, scores_at, sums_at = queries.ctypes.data, scores.ctypes.data, sums.ctypes.data
    tile_at = tile.ctypes.data

    for head in range(kv_heads):
        for m in range(count):
            own = query[m // group, head * group + m % group]
            for d in range(inner):
                if pairs:
                    bits = np.uint32(own[2 * d]) | (np.uint32(own[2 * d + 1]) << 16)
                else:
                    number = number_of(np.int32(np.uint32(own[d]) << widen))
                    bits = bits_of(number * scale)
                queries[m, d] = bits
        sums[:] = ZERO
        highest[:] = MASKED
        weight[:] = ZERO
        for start in range(begin, total, TILE):
            n = min(TILE, total - start)
            _load_keys(tile, cache, table, head, head_size, start, n, pairs)
            scores[:] = ZERO
            for m in range(0, count, ROWS):
                to, of = scores_at + 4 * m * TILE, queries_at + 4 * m * inner
                if pairs:
                    _multiply_scores(to, of, inner, inner, tile_at)
                else:
                    _multiply(to, of, inner, inner, tile_at)
            if pairs:
                scores *= scale
            _load_values(tile, cache, table, head, head_size, start, n)
            for m in range(count):
                if start + n > base or window >= 0:
                    row = first + m // group
                    hide(scores, m * TILE, row, base, visible, depths, window, start, n)
                peak = highest_of(scores, m * TILE, TILE)
                if peak > highest[m]:
                    peak += HEADROOM
                    shrink = np.float32(math.exp(highest[m] - peak))
                    weight[m] *= shrink
                    for chunk in range(chunks):
                        sums[chunk, m] *= shrink
                    highest[m] = peak
                weight[m] += exponentiate(scores, m * TILE, TILE, highest[m])
            for chunk in range(chunks):
                part = tile_at + 4 * chunk * TILE * TILE
                for m in range(0, count, ROWS):
                    to = sums_at + 4 * (chunk * strips * ROWS + m) * TILE
                    _multiply(to, scores_at + 4 * m * TILE, TILE, n, part)
        for m in range(count):
            scaling = ONE / weight[m]
            for d in range(head_size):
                mean = sums[d // TILE, m, d % TILE] * scaling
                bits = np.uint32(nearest_bfloat16(mean)) if widen else bits_of(mean)
                out[m // group, head * group + m % group, d] = bits


def tree_attention(
    query: torch.Tensor,
    cache: Any,
    placed: tuple[Any, ...],
    window: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    """`attend` on the engine's tensors; a `cpu.Kernel`."""
    integers = torch.uint16 if query.element_size() == 2 else torch.uint32
    attend(
        query.view(integers).numpy(),
        cache,
        *placed,
        window,
        np.float32(scale),
        out.view(integers).numpy(),
    )
