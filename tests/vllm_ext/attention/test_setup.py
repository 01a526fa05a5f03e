# SPDX-License-Identifier: Apache-2.0
"""Which implementation of tree attention a layer gets."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.vllm_ext.attention.cpu_layer import make_layer
from vllm_ext.attention import cpu_kernel, setup


def set_up(monkeypatch: pytest.MonkeyPatch, seconds: list[float]) -> Any:
    """A layer after set-up, where torch and the compiled kernel take these times."""
    monkeypatch.setattr(setup, "seconds_per_call", lambda *args: seconds.pop(0))
    layer = make_layer(torch.float32, 32)
    assert setup._set_up_layer(layer, {}) is None
    return layer


def test_the_compiled_kernel_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set_up(monkeypatch, [2.0, 1.0]).impl.kernel is cpu_kernel.tree_attention


def test_torch_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set_up(monkeypatch, [1.0, 2.0]).impl.kernel is None


def test_torch_where_the_compiled_kernel_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> None:
        true(*args)
        args[-1][-1] += 0.1  # the output's last row

    true = cpu_kernel.tree_attention
    monkeypatch.setattr(cpu_kernel, "tree_attention", wrong)
    assert set_up(monkeypatch, [2.0, 1.0]).impl.kernel is None


def test_torch_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm_ext.attention.cpu_kernel", None)
    assert set_up(monkeypatch, [2.0, 1.0]).impl.kernel is None


def test_layers_of_a_kind_share_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "seconds_per_call", lambda *args, times=[2.0, 1.0]: times.pop(0))
    tested: dict[tuple[Any, ...], Any] = {}
    layers = [make_layer(torch.float32, 32) for _ in range(2)]
    for layer in layers:
        assert setup._set_up_layer(layer, tested) is None
    assert all(layer.impl.kernel is cpu_kernel.tree_attention for layer in layers)


def test_what_computes_tree_rows_is_told() -> None:
    def tiles(*args: Any) -> None: ...

    tiles.__module__ = "vllm_ext.attention.amx_kernel"

    def told(*kernels: Any) -> str:
        layers = {i: SimpleNamespace(impl=SimpleNamespace(kernel=k)) for i, k in enumerate(kernels)}
        config = SimpleNamespace(static_forward_context=layers)
        return setup.describe_tree_attention(SimpleNamespace(compilation_config=config))

    assert told(None) == told(None, cpu_kernel.tree_attention) == "by torch"
    assert told(cpu_kernel.tree_attention) == "compiled"
    assert told(tiles, tiles) == "compiled for matrix tiles"
