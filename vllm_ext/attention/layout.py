# SPDX-License-Identifier: Apache-2.0
"""How the CPU cache stores keys: probed, never assumed.

vLLM's CPU writer packs the keys of a block for its own kernels (transposed for the vector ISA,
otherwise for AMX).  A wrong guess does not crash: it silently gives garbage.  So numbered keys are
written through the stock writer into a scratch block and read back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

_BASE = 128  # numbers are written in base 128: every digit is exact in bfloat16


class LayoutError(RuntimeError):
    """The cache does not hold what was written in a form that can be read back."""


@dataclass(frozen=True, slots=True)
class KeyLayout:
    """Where key element (slot, dim) of a block is stored.

    Attributes:
        block_size: slots of a block.
        head_size: dimensions of a key.
        order: int64 [block_size * head_size]; place in memory of element ``slot * head_size +
            dim``.
        transposed: whether a block is stored as [head_size, block_size].
    """

    block_size: int
    head_size: int
    order: torch.Tensor
    transposed: bool = field(init=False)

    def __post_init__(self) -> None:
        """Recognise the common layout once: it is asked for by every layer of every step."""
        expected = torch.arange(len(self.order)).view(self.head_size, self.block_size).T
        object.__setattr__(self, "transposed", torch.equal(self.order, expected.flatten()))

    def read(self, blocks: torch.Tensor) -> torch.Tensor:
        """Keys in slot order.

        Args:
            blocks: [blocks, kv_heads, block_size, head_size] as stored.

        Returns:
            [kv_heads, blocks * block_size, head_size].
        """
        count, heads = blocks.shape[:2]
        if self.transposed:
            keys = blocks.view(count, heads, self.head_size, self.block_size).permute(1, 0, 3, 2)
        else:
            flat = blocks.flatten(2).index_select(2, self.order)
            keys = flat.view(count, heads, self.block_size, self.head_size).transpose(0, 1)
        return keys.reshape(heads, count * self.block_size, self.head_size)


def read_values(blocks: torch.Tensor) -> torch.Tensor:
    """[blocks, kv_heads, block_size, head_size] as stored to [kv_heads, slots, head_size]."""
    return blocks.transpose(0, 1).reshape(blocks.shape[1], -1, blocks.shape[3])


def split_cache(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value halves, [blocks, kv_heads, block_size, head_size] each, of vLLM's CPU cache.

    Args:
        cache: [blocks, kv_heads, block_size, 2 * head_size]; within a block all keys come first.
    """
    blocks, heads, size, _ = cache.shape
    keys, values = cache.view(blocks, heads, size * 2, -1).chunk(2, dim=2)
    return keys, values


def probe(layer: Any, cache: torch.Tensor) -> KeyLayout:
    """Find the layout by writing numbered keys with the layer's own writer.

    Args:
        layer: vLLM ``Attention`` layer (its ``impl`` writes, its ``isa`` decides the packing).
        cache: the layer's cache; only its shape and dtype are used, a scratch block is written.

    Raises:
        LayoutError: keys cannot be read back one to one, or values are not stored plainly.
    """
    _, heads, block_size, width = cache.shape
    head_size = width // 2
    scratch = torch.zeros((1, heads, block_size, width), dtype=cache.dtype)
    slots = torch.arange(block_size, dtype=torch.int64)
    index = torch.arange(block_size * head_size)
    found = torch.zeros(block_size * head_size, dtype=torch.int64)
    scale = 1
    while scale < block_size * head_size:
        digit = (index // scale % _BASE).view(block_size, 1, head_size)
        written = digit.expand(-1, heads, -1).to(cache.dtype).contiguous()
        layer.impl.do_kv_cache_update(layer, written, written, scratch, slots)
        keys, values = split_cache(scratch)
        if not torch.equal(read_values(values)[0], written[:, 0]):
            raise LayoutError("values are not stored as [block_size, head_size]")
        found += keys[0, 0].flatten().round().to(torch.int64) * scale
        scale *= _BASE
    if not torch.equal(found.sort().values, index):
        raise LayoutError("keys written to the cache cannot be told apart when read back")
    return KeyLayout(block_size, head_size, torch.argsort(found))
