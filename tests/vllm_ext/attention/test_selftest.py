# SPDX-License-Identifier: Apache-2.0
"""The start-up self-test passes on this machine, and fails for everything it is there to catch."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.vllm_ext.attention.cpu_layer import make_layer
from vllm_ext.attention import cpu
from vllm_ext.attention.cpu import Kernel
from vllm_ext.attention.layout import CacheLayout, probe
from vllm_ext.attention.selftest import seconds_per_call, self_test
from vllm_ext.attention.setup import _KERNELS

COMPILED = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def kernel_of(dtype: torch.dtype) -> Kernel:
    """The compiled kernel that set-up takes for a dtype on this machine."""
    packing = ready_layer(dtype).impl.layout.packing
    kernel: Kernel = importlib.import_module(_KERNELS[packing, dtype]).tree_attention
    return kernel


def ready_layer(
    dtype: torch.dtype,
    block_size: int = 32,
    window: int | None = None,
    kernel: Kernel | None = None,
) -> Any:
    layer = make_layer(dtype, block_size, window)
    layer.impl.layout = probe(layer, layer.kv_cache)
    layer.impl.kernel = kernel
    return layer


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("window", [None, 40])
def test_passes(
    dtype: torch.dtype,
    block_size: int,
    window: int | None,
    compiled: bool,
) -> None:
    kernel = kernel_of(dtype) if compiled else None
    assert self_test(ready_layer(dtype, block_size, window, kernel), dtype) is None


@pytest.mark.parametrize("half", ["keys", "values"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_catches_a_wrong_layout(dtype: torch.dtype, half: str) -> None:
    layer = ready_layer(dtype)
    true = layer.impl.layout
    orders = {"keys": true.keys, "values": true.values}
    orders[half] = orders[half].roll(1)
    layer.impl.layout = CacheLayout(true.block_size, true.head_size, **orders)
    assert "stock kernel" in str(self_test(layer, dtype))


@COMPILED
def test_catches_a_compiled_kernel_that_reads_another_layout(dtype: torch.dtype) -> None:
    right = kernel_of(dtype)

    def one_slot_on(query: Any, cache: Any, *rest: Any) -> None:
        right(query, np.roll(cache, 1), *rest)

    layer = ready_layer(dtype, kernel=one_slot_on)
    assert "stock kernel" in str(self_test(layer, dtype))


@COMPILED
def test_catches_nodes_that_are_moved_to_the_wrong_slot(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = ready_layer(dtype, kernel=kernel_of(dtype))
    right = layer.impl.move
    monkeypatch.setattr(layer.impl, "move", lambda cache, of, to: right(cache, of, np.roll(to, 1)))
    assert "moved within the cache" in str(self_test(layer, dtype))


@COMPILED
def test_catches_a_compiled_kernel_with_one_wrong_mask_bit(dtype: torch.dtype) -> None:
    right = kernel_of(dtype)

    def one_bit(query: Any, cache: Any, placed: Any, *rest: Any) -> None:
        table, base, visible, *others = placed
        visible = visible.copy()
        hidden = np.argwhere(~visible & np.tril(np.ones_like(visible)))
        if len(hidden):
            visible[tuple(hidden[0])] = True
        right(query, cache, (table, base, visible, *others), *rest)

    layer = ready_layer(dtype, kernel=one_bit)
    assert "dense masked" in str(self_test(layer, dtype))


def test_time_per_call() -> None:
    assert 0.0 < seconds_per_call(ready_layer(torch.float32), torch.float32, calls=2) < 10.0


def test_catches_one_wrong_mask_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    original = cpu.tree_mask

    def one_bit(step: Any, tree: Any, *rest: Any) -> torch.Tensor:
        visible = tree.visible.copy()
        hidden = np.argwhere(~visible & np.tril(np.ones_like(visible)))
        if len(hidden):
            visible[tuple(hidden[0])] = True
        return original(step, replace(tree, visible=visible), *rest)

    monkeypatch.setattr(cpu, "tree_mask", one_bit)
    assert "dense masked" in str(self_test(ready_layer(torch.float32), torch.float32))


def test_catches_a_wrong_scale() -> None:
    layer = ready_layer(torch.float32)
    original = layer.impl._attend

    def scaled(*args: Any) -> torch.Tensor:
        layer.impl.scale *= 1.05
        try:
            return original(*args)
        finally:
            layer.impl.scale /= 1.05

    layer.impl._attend = scaled
    assert "stock kernel" in str(self_test(layer, torch.float32))
