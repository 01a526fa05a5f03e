# SPDX-License-Identifier: Apache-2.0
"""Which kernel reads the contexts: the rule, and the start-up measurement around a stand-in."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.vllm_ext.attention.flash_standin import flash_attn_varlen_func
from tests.vllm_ext.attention.test_cuda import engine
from tests.vllm_ext.attention.test_flash_context import flash_layer
from tests.vllm_ext.logs import logged
from vllm_ext.attention import cuda_setup, flash_context, route
from vllm_ext.attention.route import ALWAYS, Route, find_route, route_of, time_routes
from vllm_ext.attention.tree_launch import ROUTE_ATTRIBUTE

LIMITS = SimpleNamespace(
    dtype=torch.float32, num_spec_tokens=4, max_model_len=100, max_num_reqs=2, processors=2
)


def test_contexts_go_apart_from_where_that_is_always_ahead() -> None:
    begins = route_of(
        {
            8: {512: 0.9, 2048: 0.8, 8192: 0.7},
            1: {512: 0.9, 2048: 1.1, 8192: 0.96, 32768: 0.5},
            32: {512: 0.5, 2048: 0.98},
        }
    )
    assert begins == Route(((1, 8192.0), (8, 512.0), (32, math.inf)))
    assert str(begins) == ("contexts by FlashAttention from 8192 (batch 1), 512 (batch 8) tokens")


@pytest.mark.parametrize("ratios", [{}, {1: {512: 1.2}}, {1: {512: 0.5, 2048: 0.98}}])
def test_a_route_that_is_never_ahead_is_none(ratios: Any) -> None:
    assert route_of(ratios) is None


def test_the_batch_decides_with_the_context() -> None:
    begins = Route(((1, 8192.0), (8, 512.0)))
    assert not begins.splits(1, 8191.0)
    assert begins.splits(7, 8192.0)
    assert begins.splits(8, 512.0)
    assert not begins.splits(100, 511.0)
    assert not Route(((8, 0.0),)).splits(7, 1e6)  # fewer than measured
    assert ALWAYS.splits(1, 1.0)


@pytest.fixture
def flash(monkeypatch: Any) -> None:
    monkeypatch.setattr(flash_context, "flash_attention", lambda: flash_attn_varlen_func)


@pytest.mark.interpreter
@pytest.mark.usefixtures("flash")
def test_both_routes_are_timed_where_they_fit(monkeypatch: Any) -> None:
    monkeypatch.setattr(route, "_CALLS", 1)
    monkeypatch.setattr(route, "_ROUNDS", 1)
    layer = flash_layer(blocks=8)  # of 16 slots
    found = time_routes(layer, LIMITS, batches=(1, 2, 4), contexts=(20, 60, 90, 500))
    assert {batch: set(times) for batch, times in found.items()} == {1: {20, 60, 90}, 2: {20}}
    assert all(ratio > 0 for times in found.values() for ratio in times.values())


@pytest.mark.interpreter
@pytest.mark.usefixtures("flash")
def test_the_times_are_of_the_two_routes(monkeypatch: Any) -> None:
    """A route that takes longer loses, whichever it is."""
    layer = flash_layer()
    spent = {True: 1.0, False: 2.0}

    def seconds(run: Any, device: Any) -> float:
        called: list[Any] = []
        monkeypatch.setattr(
            flash_context,
            "flash_attention",
            lambda: lambda **given: called.append(1) or flash_attn_varlen_func(**given),
        )
        run()
        return spent[bool(called)]

    monkeypatch.setattr(route, "_seconds", seconds)
    assert time_routes(layer, LIMITS, (1,), (20,)) == {1: {20: 0.5}}
    spent.update({True: 3.0})
    assert time_routes(layer, LIMITS, (1,), (20,)) == {1: {20: 1.5}}


@pytest.mark.interpreter
@pytest.mark.usefixtures("flash")
def test_layers_of_a_kind_share_what_was_found(monkeypatch: Any) -> None:
    found = Route(((1, 512.0),))
    asked: list[Any] = []
    monkeypatch.setattr(route, "find_route", lambda *given: asked.append(given) or found)
    layers = {"layer": flash_layer(None), "other": flash_layer(None)}
    layers["other"].impl.__class__ = type(layers["layer"].impl)  # one backend, one class
    runner = engine(layers["layer"])
    runner.compilation_config.static_forward_context = layers
    runner.attn_groups[0][0].layer_names = list(layers)
    assert cuda_setup.set_up_tree_attention(runner) is None
    assert len(asked) == 1
    assert [getattr(layer.impl, ROUTE_ATTRIBUTE) for layer in layers.values()] == [found, found]
    assert runner.context_routes == ["contexts by FlashAttention from 512 (batch 1) tokens"]


@pytest.mark.interpreter
@pytest.mark.usefixtures("flash")
def test_the_measurement_decides(monkeypatch: Any) -> None:
    layer = flash_layer(None)
    monkeypatch.setattr(route, "time_routes", lambda *given: {1: {512: 0.5}})
    assert find_route(layer, LIMITS) == Route(((1, 512.0),))
    assert getattr(layer.impl, ROUTE_ATTRIBUTE) is None  # it is for the caller to set
    monkeypatch.setattr(route, "time_routes", lambda *given: {1: {512: 1.5}})
    assert find_route(layer, LIMITS) is None


@pytest.mark.interpreter
@pytest.mark.parametrize("broken", ["wrong", "raises"])
def test_a_route_that_does_not_work_is_left(monkeypatch: Any, broken: str) -> None:
    def flash(**given: Any) -> Any:
        if broken == "raises":
            raise RuntimeError("paged caches need blocks of 256")
        attended, lse = flash_attn_varlen_func(**given)
        return attended * 0.9, lse

    monkeypatch.setattr(flash_context, "flash_attention", lambda: flash)
    monkeypatch.setattr(route, "time_routes", lambda *given: {1: {512: 0.5}})
    layer = flash_layer(None)
    with logged(logging.WARNING) as lines:
        assert find_route(layer, LIMITS) is None
    (line,) = lines
    assert "FlashAttention does not read the contexts of trees" in line
    assert ("blocks of 256" if broken == "raises" else "differs") in line
    assert getattr(layer.impl, ROUTE_ATTRIBUTE) is None


def test_other_layers_are_not_asked(monkeypatch: Any) -> None:
    monkeypatch.setattr(route, "trees_test", lambda *given: pytest.fail("it was tested"))
    layer = flash_layer(None)
    layer.impl.vllm_flash_attn_version = None
    assert find_route(layer, LIMITS) is None
