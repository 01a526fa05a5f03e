# SPDX-License-Identifier: Apache-2.0
"""The start-up self-test passes on this machine, and fails for everything it is there to catch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.vllm_ext.attention.cpu_layer import make_layer
from vllm_ext.attention import cpu
from vllm_ext.attention.cpu_kernel import attend
from vllm_ext.attention.layout import KeyLayout, probe
from vllm_ext.attention.selftest import seconds_per_call, self_test

KERNELS = pytest.mark.parametrize("kernel", [None, attend], ids=["torch", "compiled"])


def ready_layer(
    dtype: torch.dtype,
    block_size: int = 32,
    window: int | None = None,
    kernel: Callable[..., None] | None = None,
) -> Any:
    layer = make_layer(dtype, block_size, window)
    layer.impl.key_layout = probe(layer, layer.kv_cache)
    layer.impl.kernel = kernel
    return layer


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("window", [None, 40])
def test_passes(
    dtype: torch.dtype,
    block_size: int,
    window: int | None,
    kernel: Callable[..., None] | None,
) -> None:
    assert self_test(ready_layer(dtype, block_size, window, kernel), dtype) is None


def test_catches_a_wrong_layout() -> None:
    layer = ready_layer(torch.float32)
    true = layer.impl.key_layout
    layer.impl.key_layout = KeyLayout(
        true.block_size, true.head_size, torch.arange(len(true.order))
    )
    assert "stock kernel" in str(self_test(layer, torch.float32))


def test_catches_a_compiled_kernel_that_reads_another_layout() -> None:
    def plain_keys(query: Any, cache: Any, *rest: Any) -> None:
        stored = cache[:, :, 0].reshape(*cache.shape[:2], query.shape[2], -1)
        wrong = cache.copy()
        wrong[:, :, 0] = stored.swapaxes(2, 3).reshape(wrong[:, :, 0].shape)
        attend(query, wrong, *rest)

    layer = ready_layer(torch.float32, kernel=plain_keys)
    assert "stock kernel" in str(self_test(layer, torch.float32))


def test_catches_a_compiled_kernel_with_one_wrong_mask_bit() -> None:
    def one_bit(query: Any, cache: Any, table: Any, base: int, visible: Any, *rest: Any) -> None:
        wrong = visible.copy()
        hidden = np.argwhere(~wrong & np.tril(np.ones_like(wrong)))
        if len(hidden):
            wrong[tuple(hidden[0])] = True
        attend(query, cache, table, base, wrong, *rest)

    layer = ready_layer(torch.float32, kernel=one_bit)
    assert "dense masked" in str(self_test(layer, torch.float32))


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
