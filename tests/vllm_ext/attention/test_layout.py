# SPDX-License-Identifier: Apache-2.0
"""Probing the cache layout, with writers that pack in different ways and with vLLM's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.vllm_ext.attention.cpu_layer import HEAD, make_layer
from vllm_ext.attention.layout import PAIRS, ROWS, LayoutError, probe, split_cache

BLOCK, SIZE, HEADS = 32, 16, 2
PLAIN = torch.arange(BLOCK * SIZE).view(BLOCK, SIZE)
TRANSPOSED = torch.arange(BLOCK * SIZE).view(SIZE, BLOCK).T
SHUFFLED = torch.randperm(BLOCK * SIZE, generator=torch.Generator().manual_seed(0)).view(
    PLAIN.shape
)
# Two of something beside each other, sixteen of those in a row.
PAIRED_KEYS = torch.arange(BLOCK * SIZE).view(BLOCK // 16, SIZE // 2, 16, 2).permute(0, 2, 1, 3)
PAIRED_VALUES = torch.arange(BLOCK * SIZE).view(SIZE // 16, BLOCK // 2, 16, 2).permute(1, 3, 0, 2)


class Writer:
    """A cache writer that stores element (slot, dim) of a block at ``order[slot, dim]``."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.orders = keys.reshape(BLOCK, SIZE), values.reshape(BLOCK, SIZE)
        self.scales = [1, 1]

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, cache: Any, slots: torch.Tensor
    ) -> None:
        halves = zip(split_cache(cache), (key, value), self.orders, self.scales, strict=True)
        for stored, given, order, scale in halves:
            for i, slot in enumerate(slots.tolist()):
                block, offset = divmod(slot, BLOCK)
                for head in range(HEADS):
                    stored[block, head].view(-1)[order[offset]] = given[i, head] * scale


ORDERS = {
    "plain": (PLAIN, PLAIN, None),
    "transposed": (TRANSPOSED, PLAIN, ROWS),
    "both transposed": (TRANSPOSED, TRANSPOSED, None),
    "shuffled": (SHUFFLED, SHUFFLED.flip(0), None),
    "pairs": (PAIRED_KEYS, PAIRED_VALUES, PAIRS),
}


def fake(name: str) -> tuple[Any, torch.Tensor]:
    cache = torch.zeros(3, HEADS, BLOCK, 2 * SIZE, dtype=torch.bfloat16)
    return SimpleNamespace(impl=Writer(*ORDERS[name][:2])), cache


@pytest.mark.parametrize("name", ORDERS)
def test_what_was_written_is_read(name: str) -> None:
    layer, cache = fake(name)
    layout = probe(layer, cache)
    assert layout.packing == ORDERS[name][2]
    keys, values = torch.randn(2, 2 * BLOCK, HEADS, SIZE).to(cache.dtype)
    slots = torch.cat([torch.arange(2 * BLOCK, 3 * BLOCK), torch.arange(0, BLOCK)])
    layer.impl.do_kv_cache_update(layer, keys, values, cache, slots)
    key_cache, value_cache = split_cache(cache)
    table = torch.tensor([2, 0])
    assert torch.equal(layout.read_keys(key_cache[table]), keys.transpose(0, 1))
    assert torch.equal(layout.read_values(value_cache[table]), values.transpose(0, 1))


@pytest.mark.parametrize(("half", "name"), [(0, "keys"), (1, "values")])
def test_a_cache_that_cannot_be_read_back_is_refused(half: int, name: str) -> None:
    layer, cache = fake("plain")
    layer.impl.scales[half] = 0
    with pytest.raises(LayoutError, match=f"{name} .* told apart"):
        probe(layer, cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_the_stock_writer_can_be_read(dtype: torch.dtype, block_size: int) -> None:
    layer = make_layer(dtype, block_size)
    layout = probe(layer, layer.kv_cache)
    assert layout.packing == (PAIRS if layer.isa == "amx" else ROWS)
    keys, values = torch.randn(2, block_size, layer.impl.num_kv_heads, HEAD).to(dtype)
    layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, torch.arange(block_size))
    key_cache, value_cache = split_cache(layer.kv_cache)
    assert torch.equal(layout.read_keys(key_cache[:1]), keys.transpose(0, 1))
    assert torch.equal(layout.read_values(value_cache[:1]), values.transpose(0, 1))
