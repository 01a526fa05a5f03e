# SPDX-License-Identifier: Apache-2.0
"""A request with a random tree for the compiled kernels of the CPU, and its dense attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

CHANGES: list[tuple[str, Any]] = [
    ("visible", np.tri(13, dtype=np.bool_)),  # siblings are seen
    ("depths", np.arange(13)),  # positions of a chain, which the window sees
    ("base", 299),
    ("first", 0),
    ("window", -1),
    ("scale", np.float32(0.12)),
]
"""Arguments that make another result of ``Case(base=300, nodes=12, window=2, first=1)``."""


@dataclass
class Case:
    """A random request: its cache as the engine stores it, and the plain keys and values."""

    base: int
    nodes: int
    heads: int = 6
    kv_heads: int = 2
    size: int = 64
    block_size: int = 32
    window: int = -1
    first: int = 0
    bfloat16: bool = False
    paired: bool = False  # packed for matrix tiles
    unwritten: float = 1e6
    gap: int = 0  # heads of something else behind the heads of a block
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        rows = self.nodes + 1
        total = self.base + rows
        blocks = -(-total // self.block_size)
        shape = (total, self.kv_heads, self.size)
        self.keys, self.values = (self._rounded(rng.standard_normal(shape)) for _ in range(2))
        self.query = self._rounded(rng.standard_normal((rows - self.first, self.heads, self.size)))
        self.visible = np.eye(rows, dtype=np.bool_)
        self.depths = np.zeros(rows, np.int64)
        for row in range(1, rows):
            parent = int(rng.integers(0, row))
            self.visible[row] |= self.visible[parent]
            self.depths[row] = self.depths[parent] + 1
        self.table = (1 + rng.permutation(blocks)).astype(np.int32)
        # Slots that hold no key of this request must not matter.
        heads = self.kv_heads + self.gap
        shape_of_all = (blocks + 1, heads, 2, self.block_size * self.size)
        cache = np.full(shape_of_all, self.unwritten, np.float32)
        key_places, value_places = self._places()
        for slot in range(total):
            block, offset = self.table[slot // self.block_size], slot % self.block_size
            for head in range(self.kv_heads):
                cache[block, head, 0, key_places[offset]] = self.keys[slot, head]
                cache[block, head, 1, value_places[offset]] = self.values[slot, head]
        bits: NDArray[Any] = cache.view(np.uint32)
        if self.bfloat16:
            bits = (bits >> 16).astype(np.uint16)
        self.cache = bits[:, : self.kv_heads]

    def _places(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where a block has element (slot, dim) of a key and of a value."""
        size, slots = self.size, self.block_size
        numbers = np.arange(size * slots)
        if not self.paired:
            return numbers.reshape(size, slots).T, numbers.reshape(slots, size)
        keys = numbers.reshape(slots // 16, size // 2, 16, 2).transpose(0, 2, 1, 3)
        values = numbers.reshape(size // 16, slots // 2, 16, 2).transpose(1, 3, 0, 2)
        return keys.reshape(slots, size), values.reshape(slots, size)

    def _rounded(self, values: NDArray[np.float64]) -> Floats:
        single = values.astype(np.float32)
        if self.bfloat16:
            single = (single.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        return single

    def arguments(self) -> dict[str, Any]:
        """Of the kernels, in order, without the output."""
        return {
            "query": self.query,
            "cache": self.cache,
            "table": self.table,
            "base": self.base,
            "visible": self.visible,
            "depths": self.depths,
            "first": self.first,
            "window": self.window,
            "scale": np.float32(self.size**-0.5),
        }

    def dense(self) -> NDArray[np.float64]:
        """Masked attention in float64."""
        group = self.heads // self.kv_heads
        keys = self.keys.astype(np.float64).repeat(group, axis=1)
        values = self.values.astype(np.float64).repeat(group, axis=1)
        scores = np.einsum("qhd,khd->hqk", self.query, keys) * self.size**-0.5
        seen = np.ones((self.nodes + 1, len(keys)), np.bool_)
        seen[:, self.base :] = self.visible
        if self.window >= 0:
            position = np.arange(len(keys))
            position[self.base :] = self.base + self.depths
            seen &= position[self.base :, None] - position[None] < self.window
        scores[:, ~seen[self.first :]] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out: NDArray[np.float64] = np.einsum("hqk,khd->qhd", weights, values)
        return out
