# SPDX-License-Identifier: Apache-2.0
"""The start-up timing of attention, with a clock of our own and on a real layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.vllm_ext.attention.cpu_layer import make_layer
from vllm_ext.attention import timing
from vllm_ext.attention.layout import probe
from vllm_ext.attention.timing import time_attention


def runner(layers: list[Any], max_model_len: int = 2048) -> Any:
    context = {f"layer{i}": layer for i, layer in enumerate(layers)}
    return SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=context),
        kv_cache_config=SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=[*context])]),
        max_model_len=max_model_len,
    )


def fake_layer(window: int = -1) -> Any:
    impl = SimpleNamespace(num_heads=4, sliding_window=window)
    return SimpleNamespace(impl=impl, kv_cache=torch.zeros(1, 2, 32, 64))


def test_the_terms_are_those_of_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    now, timed = [0.0], []

    class Case:
        def __init__(self, layer: Any, dtype: Any, base: int, tree: Any, generator: Any) -> None:
            self.base, self.nodes = base, len(tree)
            timed.append(layer)

        def stock(self) -> None:
            now[0] += 0.5 + 1e-4 * self.base

        def tree_attention(self) -> None:
            now[0] += 0.5 + 1e-4 * self.base + 1e-5 * self.nodes * self.base

    monkeypatch.setattr(timing, "_Case", Case)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    full, other = fake_layer(), fake_layer(window=16)
    cost = time_attention(runner([full, full, other, full]))
    assert cost.context == pytest.approx(4e-4)
    assert cost.drafted == pytest.approx(4e-5)
    assert cost.branching == pytest.approx(4 * (0.5 + 1e-4 * 64))
    assert len({id(layer) for layer in timed}) == 2  # one layer of each kind


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the engine's worker has no more threads than cores: two on one core wait for each other
    longer than they compute, and nothing can be timed.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_real_layer_can_be_timed() -> None:
    layer = make_layer(torch.float32, 32, None)
    layer.impl.layout = probe(layer, layer.kv_cache)
    # A context long enough to be seen on a busy machine.
    cost = time_attention(runner([layer], max_model_len=4096))
    assert 0.0 < cost.context + cost.drafted < math.inf


def test_a_model_without_room_for_a_context_is_not_timed() -> None:
    cost = time_attention(runner([fake_layer()], max_model_len=9))
    assert cost.context == cost.drafted == cost.branching == 0.0
