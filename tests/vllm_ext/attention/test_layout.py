# SPDX-License-Identifier: Apache-2.0
"""Probing the key layout, with writers that pack in different ways and with vLLM's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.vllm_ext.attention.cpu_layer import HEAD, make_layer
from vllm_ext.attention.layout import LayoutError, probe, read_values, split_cache

BLOCK, SIZE, HEADS = 32, 16, 2


class Writer:
    """A cache writer that stores element (slot, dim) of a block at ``order[slot, dim]``."""

    def __init__(self, order: torch.Tensor, corrupt: bool = False) -> None:
        self.order, self.corrupt = order, corrupt

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, cache: Any, slots: torch.Tensor
    ) -> None:
        keys, values = split_cache(cache)
        for i, slot in enumerate(slots.tolist()):
            block, offset = divmod(slot, BLOCK)
            for head in range(HEADS):
                flat = keys[block, head].view(-1)
                flat[self.order[offset]] = key[i, head] * (0 if self.corrupt else 1)
                values[block, head, offset] = value[i, head]


ORDERS = {
    "plain": torch.arange(BLOCK * SIZE).view(BLOCK, SIZE),
    "transposed": torch.arange(BLOCK * SIZE).view(SIZE, BLOCK).T,
    "shuffled": torch.randperm(BLOCK * SIZE, generator=torch.Generator().manual_seed(0)).view(
        BLOCK, SIZE
    ),
}


def fake(name: str, corrupt: bool = False) -> tuple[Any, torch.Tensor]:
    cache = torch.zeros(3, HEADS, BLOCK, 2 * SIZE, dtype=torch.bfloat16)
    return SimpleNamespace(impl=Writer(ORDERS[name], corrupt)), cache


@pytest.mark.parametrize("name", ORDERS)
def test_keys_are_read_as_they_were_written(name: str) -> None:
    layer, cache = fake(name)
    layout = probe(layer, cache)
    assert layout.transposed == (name == "transposed")
    keys = torch.randn(2 * BLOCK, HEADS, SIZE).to(cache.dtype)
    slots = torch.cat([torch.arange(2 * BLOCK, 3 * BLOCK), torch.arange(0, BLOCK)])
    layer.impl.do_kv_cache_update(layer, keys, keys, cache, slots)
    key_cache, value_cache = split_cache(cache)
    table = torch.tensor([2, 0])
    assert torch.equal(layout.read(key_cache[table]), keys.transpose(0, 1))
    assert torch.equal(read_values(value_cache[table]), keys.transpose(0, 1))


def test_a_cache_that_cannot_be_read_back_is_refused() -> None:
    layer, cache = fake("plain", corrupt=True)
    with pytest.raises(LayoutError, match="told apart"):
        probe(layer, cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_the_stock_writer_can_be_read(dtype: torch.dtype, block_size: int) -> None:
    layer = make_layer(dtype, block_size)
    layout = probe(layer, layer.kv_cache)
    keys = torch.randn(block_size, layer.impl.num_kv_heads, HEAD).to(dtype)
    layer.impl.do_kv_cache_update(layer, keys, keys, layer.kv_cache, torch.arange(block_size))
    key_cache, _ = split_cache(layer.kv_cache)
    assert torch.equal(layout.read(key_cache[:1]), keys.transpose(0, 1))
