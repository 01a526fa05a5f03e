# SPDX-License-Identifier: Apache-2.0
"""Tree attention of one request on one core, compiled by Numba.

Torch needs a dozen operators per layer for a tree, each of which copies the context or a part of
it. Here it is read once: in tiles of ``TILE`` slots that fit the first-level cache, with a running
maximum and normaliser (the online softmax of FlashAttention, arXiv 2205.14135),

    m' = max(m, max_j s_j),  l' = l e^(m - m') + sum_j e^(s_j - m'),
    o' = o e^(m - m') + sum_j e^(s_j - m') v_j,

in float32 whatever the dtype of the cache, as the stock kernel computes. Query heads that share a
key head are rows of the same small matrix products.

The loops have the shape that LLVM turns into full-width fused multiply-adds: constant trip counts,
two rows at a time, and offsets into one array rather than several arrays that might overlap.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from vllm_ext.compiled import ONE, ZERO, compiled, copy_bits, exponentiate, highest_of, wide_vectors
from vllm_ext.worker.step import TreeRows

TILE = 64
"""Slots per tile, and columns of a head per accumulator."""

MASKED = np.float32(-1e30)


@compiled
def _load(
    keys: Any, values: Any, cache: Any, table: Any, head: int, head_size: int, start: int, n: int
) -> None:
    """Read ``n`` slots of a head from ``start`` on.

    Args:
        keys: written, bits of float32 [head_size, TILE].
        values: written, bits of float32 [columns / TILE, TILE, TILE].
        cache: as in `attend`, as are the others.
        table: blocks of the request.
        head: key head.
        head_size: of a head.
        start: first slot.
        n: slots.
    """
    block_size = cache.shape[3] // head_size
    done = 0
    while done < n:
        offset = (start + done) % block_size
        run = min(block_size - offset, n - done)
        block = cache[table[(start + done) // block_size], head]
        copy_bits(keys, done, TILE, block[0], offset, block_size, head_size, run)
        for d in range(0, head_size, TILE):
            to, width = (d + done) * TILE, min(TILE, head_size - d)
            copy_bits(values, to, TILE, block[1], offset * head_size + d, head_size, run, width)
        done += run


@compiled
def _multiply_pair(out: Any, left: Any, pitch: int, inner: int, right: Any) -> None:
    """``out [2, TILE] += left [2, pitch][:, :inner] @ right [inner, TILE]``; inner in fours."""
    wide_vectors()
    for i in range(0, inner, 4):
        a0, a1, a2, a3 = left[i], left[i + 1], left[i + 2], left[i + 3]
        k = pitch + i
        b0, b1, b2, b3 = left[k], left[k + 1], left[k + 2], left[k + 3]
        rows = right[i * TILE : i * TILE + 4 * TILE]
        for j in range(TILE):
            r0, r1, r2, r3 = rows[j], rows[TILE + j], rows[2 * TILE + j], rows[3 * TILE + j]
            out[j] = out[j] + a0 * r0 + a1 * r1 + a2 * r2 + a3 * r3
            out[TILE + j] = out[TILE + j] + b0 * r0 + b1 * r1 + b2 * r2 + b3 * r3


@compiled
def first_slot(base: int, depth: int, window: int) -> int:
    """Where the tiles begin that a tree's rows see, the first of which has this depth."""
    return max(0, (base + depth - window + 1) // TILE * TILE) if window >= 0 else 0


@compiled
def hide(
    scores: Any, row: int, base: int, visible: Any, depths: Any, window: int, start: int, n: int
) -> None:
    """Hide from a tree row what it must not see of the ``n`` slots from ``start`` on."""
    for j in range(max(0, base - start), n):
        if not visible[row, start + j - base]:
            scores[j] = MASKED
    if window >= 0:  # in positions; slots of a tree are not its positions
        edge = base + depths[row] - window
        for j in range(n):
            slot = start + j
            position = slot if slot < base else base + depths[slot - base]
            if position <= edge:
                scores[j] = MASKED


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
        query: float32 [rows, heads, head_size]; head_size in fours.
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
        out: float32 [rows, heads, head_size], written.
    """
    wide_vectors()
    rows, heads, head_size = query.shape
    kv_heads = cache.shape[1]
    group = heads // kv_heads
    count = rows * group
    pairs = (count + 1) // 2
    chunks = (head_size + TILE - 1) // TILE
    total = base + visible.shape[0]
    begin = first_slot(base, depths[first], window)

    queries = np.zeros((pairs, 2 * head_size), np.float32)
    scores = np.empty((pairs, 2 * TILE), np.float32)
    sums = np.empty((pairs, chunks, 2 * TILE), np.float32)
    highest = np.empty(2 * pairs, np.float32)
    weight = np.empty(2 * pairs, np.float32)
    key_bits = np.zeros(head_size * TILE, np.uint32)
    value_bits = np.zeros(chunks * TILE * TILE, np.uint32)
    keys, values = key_bits.view(np.float32), value_bits.view(np.float32)

    for head in range(kv_heads):
        for m in range(count):
            for d in range(head_size):
                element = query[m // group, head * group + m % group, d]
                queries[m // 2, m % 2 * head_size + d] = element * scale
        sums[:] = ZERO
        highest[:] = MASKED
        weight[:] = ZERO
        for start in range(begin, total, TILE):
            n = min(TILE, total - start)
            _load(key_bits, value_bits, cache, table, head, head_size, start, n)
            for pair in range(pairs):
                scores[pair] = ZERO
                _multiply_pair(scores[pair], queries[pair], head_size, head_size, keys)
            for m in range(2 * pairs):
                mine = scores[m // 2, m % 2 * TILE : m % 2 * TILE + TILE]
                if m < count and (start + n > base or window >= 0):
                    hide(mine, first + m // group, base, visible, depths, window, start, n)
                mine[n:] = MASKED
                top = max(highest[m], highest_of(mine, 0, TILE))
                if top != highest[m]:
                    shrink = np.float32(math.exp(highest[m] - top))
                    weight[m] *= shrink
                    for chunk in range(chunks):
                        sums[m // 2, chunk, m % 2 * TILE : m % 2 * TILE + TILE] *= shrink
                    highest[m] = top
                weight[m] += exponentiate(mine, top)
            inner = (n + 3) // 4 * 4
            for pair in range(pairs):
                for chunk in range(chunks):
                    part = values[chunk * TILE * TILE : (chunk + 1) * TILE * TILE]
                    _multiply_pair(sums[pair, chunk], scores[pair], TILE, inner, part)
        for m in range(count):
            scaling = ONE / weight[m]
            for d in range(head_size):
                summed = sums[m // 2, d // TILE, m % 2 * TILE + d % TILE]
                out[m // group, head * group + m % group, d] = summed * scaling


def tree_arguments(
    table: torch.Tensor, tree: TreeRows, window: int, scale: float
) -> tuple[Any, ...]:
    """The arguments of a kernel from ``table`` to ``scale``; see `attend`."""
    rows = tree.base, tree.visible, tree.depths, tree.first
    return table.numpy(), *rows, window, np.float32(scale)


def tree_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    table: torch.Tensor,
    tree: TreeRows,
    window: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    """`attend` on the engine's tensors; a `cpu.Kernel`."""
    integers = torch.uint16 if cache.element_size() == 2 else torch.uint32
    exact = torch.empty(query.shape, dtype=torch.float32)
    attend(
        query.float().contiguous().numpy(),
        cache.view(integers).view(*cache.shape[:2], 2, -1).numpy(),
        *tree_arguments(table, tree, window, scale),
        exact.numpy(),
    )
    out.copy_(exact)
