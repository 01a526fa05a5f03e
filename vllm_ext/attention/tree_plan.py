# SPDX-License-Identifier: Apache-2.0
"""The work of one launch of the Triton tree kernel, laid out on the host.

A *tree* here is any run of up to 128 consecutive rows of one request: a root and its nodes, a chain
(a short prompt chunk is one too), or a single row.  Its rows see the committed context and those
rows of the tree that their ancestor words name.  The key ranges of all trees are cut into chunks of
one length (split-K, as in Flash-Decoding), so that a launch is a flat list of equal pieces of work
however ragged the batch is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

MAX_ROWS = 128
"""Rows of a tree: the root and up to 127 nodes, one bit each in two 64-bit words."""

_PIECES_PER_PROCESSOR = 2  # enough to level out pieces that start late
_SHORTEST_CHUNK = 4  # tiles; below this, combining costs more than the parallelism brings


@dataclass(frozen=True, slots=True)
class RowTree:
    """Consecutive rows of one request.

    Attributes:
        request: row of the block table.
        start: batch row of the root.
        base: position and slot of the root; row i holds slot ``base + i``.
        words: int64 [rows, 2]; bit ``j % 64`` of word ``j // 64``: the row sees row j.
        depths: int32 [rows]; row i has position ``base + depths[i]``.
    """

    request: int
    start: int
    base: int
    words: NDArray[np.int64]
    depths: NDArray[np.int32]

    @classmethod
    def build(
        cls,
        request: int,
        start: int,
        base: int,
        visible: NDArray[np.bool_],
        depths: NDArray[np.int64],
    ) -> RowTree:
        """Pack a tree from its visibility matrix [rows, rows].

        Raises:
            ValueError: the tree has more than 128 rows.
        """
        return cls(request, start, base, pack_words(visible), depths.astype(np.int32))

    @classmethod
    def chain(cls, request: int, start: int, base: int, rows: int) -> RowTree:
        """Rows that see every row before them: a chain, or a single row."""
        return cls(request, start, base, _CHAIN_WORDS[:rows], _CHAIN_DEPTHS[:rows])


def pack_words(visible: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Ancestor words, int64 [rows, 2], of a bool matrix [rows, rows].

    Raises:
        ValueError: more than 128 rows.
    """
    rows = len(visible)
    if rows > MAX_ROWS:
        raise ValueError(f"a tree of {rows} rows: the kernel takes at most {MAX_ROWS}")
    bits = np.zeros((rows, MAX_ROWS), dtype=np.bool_)
    bits[:, :rows] = visible
    return np.packbits(bits, axis=1, bitorder="little").view("<i8")


_CHAIN_WORDS = pack_words(np.tri(MAX_ROWS, dtype=np.bool_))
_CHAIN_DEPTHS = np.arange(MAX_ROWS, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """Device tensors that describe one launch; shared by all layers of a kind.

    Attributes:
        trees: int32 [trees, 8]: request, start, rows, base, first slot, first row, first partial
            row, splits.
        rows: int32 [rows, 2]: tree, depth; the rows of all trees, one after another.
        words: int64 [rows, 2]: ancestor words.
        items: int32 [items, 3]: tree, row block, split.
        chunk: slots of a split.
        partials: rows of partial results; 0 if no tree is split.
    """

    trees: torch.Tensor
    rows: torch.Tensor
    words: torch.Tensor
    items: torch.Tensor
    chunk: int
    partials: int


def plan_launch(
    trees: Sequence[RowTree],
    group: int,
    kv_heads: int,
    window: int,
    block_m: int,
    block_n: int,
    processors: int,
    device: torch.device,
    chunk: int | None = None,
    context: bool = True,
) -> LaunchPlan:
    """Cut the trees into pieces of work.

    Args:
        trees: of the launch, at least one.
        group: query heads per key head.
        kv_heads: of the layer.
        window: sliding window in positions, or -1.
        block_m: rows times query heads of a group that one program handles.
        block_n: slots that it reads at a time.
        processors: streaming multiprocessors of the device.
        device: where the plan goes.
        chunk: slots of a split, instead of the plan's own choice.
        context: whether to read the committed context, and not the trees' own rows alone, which are
            one piece each.
    """
    count = len(trees)
    sizes = np.array([len(tree.depths) for tree in trees])
    bases = np.array([tree.base for tree in trees])
    if not context:
        firsts, chunk = bases, MAX_ROWS
    else:
        firsts = np.maximum(bases - window + 1, 0) if window >= 0 else np.zeros_like(bases)
    lengths = bases + sizes - firsts
    blocks = -(-sizes * group // block_m)
    if chunk is None:
        slots = int((blocks * lengths).sum()) * kv_heads
        wanted = -(-slots // (_PIECES_PER_PROCESSOR * processors))
        chunk = max(-(-wanted // block_n), _SHORTEST_CHUNK) * block_n
    splits = -(-lengths // chunk)
    split_rows = np.where(splits > 1, sizes * splits, 0)

    table = np.empty((count, 8), dtype=np.int32)
    table[:, 0] = [tree.request for tree in trees]
    table[:, 1] = [tree.start for tree in trees]
    table[:, 2] = sizes
    table[:, 3] = bases
    table[:, 4] = firsts
    table[:, 5] = np.cumsum(sizes) - sizes
    table[:, 6] = np.cumsum(split_rows) - split_rows
    table[:, 7] = splits

    rows = np.empty((int(sizes.sum()), 2), dtype=np.int32)
    rows[:, 0] = np.repeat(np.arange(count), sizes)
    rows[:, 1] = np.concatenate([tree.depths for tree in trees])

    # Row blocks of one split next to each other: they read the same keys, then from the L2 cache.
    pieces = blocks * splits
    items = np.empty((int(pieces.sum()), 3), dtype=np.int32)
    items[:, 0] = np.repeat(np.arange(count), pieces)
    place = np.arange(len(items)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    items[:, 1] = place % blocks[items[:, 0]]
    items[:, 2] = place // blocks[items[:, 0]]

    def to_device(array: NDArray[np.int32] | NDArray[np.int64]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if device.type == "cuda":
            return tensor.pin_memory().to(device, non_blocking=True)
        return tensor

    return LaunchPlan(
        trees=to_device(table),
        rows=to_device(rows),
        words=to_device(np.concatenate([tree.words for tree in trees])),
        items=to_device(items),
        chunk=chunk,
        partials=int(split_rows.sum()),
    )
