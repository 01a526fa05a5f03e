# SPDX-License-Identifier: Apache-2.0
"""The start-up self-test passes on this machine, and fails for everything it is there to catch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.vllm_ext.attention.cpu_layer import make_layer
from vllm_ext.attention import cpu
from vllm_ext.attention.layout import KeyLayout, probe
from vllm_ext.attention.selftest import self_test


def ready_layer(dtype: torch.dtype, block_size: int = 32, window: int | None = None) -> Any:
    layer = make_layer(dtype, block_size, window)
    layer.impl.key_layout = probe(layer, layer.kv_cache)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("window", [None, 40])
def test_passes(dtype: torch.dtype, block_size: int, window: int | None) -> None:
    assert self_test(ready_layer(dtype, block_size, window), dtype) is None


def test_catches_a_wrong_layout() -> None:
    layer = ready_layer(torch.float32)
    true = layer.impl.key_layout
    layer.impl.key_layout = KeyLayout(
        true.block_size, true.head_size, torch.arange(len(true.order))
    )
    assert "stock kernel" in str(self_test(layer, torch.float32))


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
