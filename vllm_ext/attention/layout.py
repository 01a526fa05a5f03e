# SPDX-License-Identifier: Apache-2.0
"""How the CPU cache stores keys and values: probed, never assumed.

vLLM's CPU writer packs the keys and values of a block for its own kernels, by the instruction set
of the machine.  A wrong guess does not crash: it silently gives garbage.  So numbered elements are
written through the stock writer into a scratch block and read back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

_BASE = 128  # numbers are written in base 128: every digit is exact in bfloat16
_LANES = 16  # 32-bit elements of a vector register, and rows of a tile

ROWS = "rows"
"""Packing for vector units: keys [head_size, block_size], values [block_size, head_size]."""

PAIRS = "pairs"
"""Packing for AMX's products of bfloat16 pairs: keys [slots / 16, head_size / 2, 16 slots, 2
dimensions], values [head_size / 16, slots / 2, 16 dimensions, 2 slots].
"""


class LayoutError(RuntimeError):
    """The cache does not hold what was written in a form that can be read back."""


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Where element (slot, dim) of a key or value is stored in a block of one head.

    Attributes:
        block_size: slots of a block.
        head_size: dimensions of a key and of a value.
        keys: int64 [block_size * head_size]; place in memory of element ``slot * head_size + dim``.
        values: as `keys`.
        packing: `ROWS`, `PAIRS`, or ``None`` for anything else, which only `read_keys` and
            `read_values` understand.
    """

    block_size: int
    head_size: int
    keys: torch.Tensor
    values: torch.Tensor
    packing: str | None = field(init=False)

    def __post_init__(self) -> None:
        """Recognise the common packings once: it is asked for by every layer of every step."""
        found = None
        for name, order in _PACKINGS.items():
            keys, values = order(self.block_size, self.head_size)
            if torch.equal(self.keys, keys) and torch.equal(self.values, values):
                found = name
        object.__setattr__(self, "packing", found)

    def read_keys(self, blocks: torch.Tensor) -> torch.Tensor:
        """Keys in slot order.

        Args:
            blocks: [blocks, kv_heads, block_size, head_size] as stored.

        Returns:
            [kv_heads, blocks * block_size, head_size].
        """
        if self.packing == ROWS:
            transposed = blocks.view(*blocks.shape[:2], self.head_size, self.block_size)
            return transposed.permute(1, 0, 3, 2).reshape(blocks.shape[1], -1, self.head_size)
        return self._gather(blocks, self.keys)

    def read_values(self, blocks: torch.Tensor) -> torch.Tensor:
        """Values in slot order; see `read_keys`."""
        if self.packing == ROWS:
            return blocks.transpose(0, 1).reshape(blocks.shape[1], -1, self.head_size)
        return self._gather(blocks, self.values)

    def _gather(self, blocks: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        flat = blocks.flatten(2).index_select(2, order)
        return flat.transpose(0, 1).reshape(blocks.shape[1], -1, self.head_size)


def _rows(block_size: int, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.arange(block_size * head_size)
    return numbers.view(head_size, block_size).T.flatten(), numbers


def _pairs(block_size: int, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    slot, dim = torch.arange(block_size)[:, None], torch.arange(head_size)[None]
    keys = slot // _LANES * (_LANES * head_size) + dim // 2 * (2 * _LANES)
    keys = keys + slot % _LANES * 2 + dim % 2
    values = dim // _LANES * (_LANES * block_size) + slot // 2 * (2 * _LANES)
    values = values + dim % _LANES * 2 + slot % 2
    return keys.flatten(), values.flatten()


_PACKINGS = {ROWS: _rows, PAIRS: _pairs}


def split_cache(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value halves, [blocks, kv_heads, block_size, head_size] each, of vLLM's CPU cache.

    Args:
        cache: [blocks, kv_heads, block_size, 2 * head_size]; within a block all keys come first.
    """
    blocks, heads, size, _ = cache.shape
    keys, values = cache.view(blocks, heads, size * 2, -1).chunk(2, dim=2)
    return keys, values


def probe(layer: Any, cache: torch.Tensor) -> CacheLayout:
    """Find the layout by writing numbered keys and values with the layer's own writer.

    Args:
        layer: vLLM ``Attention`` layer (its ``impl`` writes, its ``isa`` decides the packing).
        cache: the layer's cache; only its shape and dtype are used, a scratch block is written.

    Raises:
        LayoutError: they cannot be read back one to one.
    """
    _, heads, block_size, width = cache.shape
    head_size = width // 2
    scratch = torch.zeros((1, heads, block_size, width), dtype=cache.dtype)
    slots = torch.arange(block_size, dtype=torch.int64)
    index = torch.arange(block_size * head_size)
    found = torch.zeros((2, block_size * head_size), dtype=torch.int64)
    scale = 1
    while scale < block_size * head_size:
        digit = (index // scale % _BASE).view(block_size, 1, head_size)
        written = digit.expand(-1, heads, -1).to(cache.dtype).contiguous()
        layer.impl.do_kv_cache_update(layer, written, written, scratch, slots)
        for half, stored in zip(found, split_cache(scratch), strict=True):
            half += stored[0, 0].flatten().round().to(torch.int64) * scale
        scale *= _BASE
    for name, half in zip(("keys", "values"), found, strict=True):
        if not torch.equal(half.sort().values, index):
            raise LayoutError(f"{name} written to the cache cannot be told apart when read back")
    return CacheLayout(block_size, head_size, *map(torch.argsort, found))
