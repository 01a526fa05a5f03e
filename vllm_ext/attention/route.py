# SPDX-License-Identifier: Apache-2.0
"""Which kernel reads the committed contexts of a step with trees: measured at start, on this card.

Two routes give the same attention. Either the tree kernel reads everything, one launch per layer;
or FlashAttention reads the contexts and the tree kernel goes on from there, two launches, of which
the first is the kernel that plain vLLM decodes with. Where the one overtakes the other depends on
the card, the heads, the batch and how long the host takes to queue a launch, so both are timed as a
step runs them, queued one after another, and FlashAttention gets the contexts from the length on
from which it was always ahead.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_ext.attention.cuda_selftest import trees_test
from vllm_ext.attention.flash_context import why_no_flash_context
from vllm_ext.attention.measure import random_tree
from vllm_ext.attention.tree_launch import ROUTE_ATTRIBUTE, DeviceStep, TreeLaunch, key_value_views
from vllm_ext.worker.step import AttentionStep

logger = init_logger("vllm.vllm_ext")

CONTEXTS = (512, 2048, 8192, 32768)
BATCHES = (1, 8, 32)
_NODES = 15
_AHEAD = 0.97
"""Times of the tree kernel alone; a route that is no faster than that is not worth two launches."""
_CALLS = 20
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Route:
    """From which context on FlashAttention reads it.

    Attributes:
        begins: tokens of context per request, by requests of the batch, both ascending in the
            latter; infinite where it never does.
    """

    begins: tuple[tuple[int, float], ...]

    def splits(self, batch: int, context: float) -> bool:
        """Whether FlashAttention reads the contexts of a step.

        Args:
            batch: requests; those measured with no more decide.
            context: mean tokens of their contexts.
        """
        begin = math.inf
        for measured, tokens in self.begins:
            if measured <= batch:
                begin = tokens
        return context >= begin

    def __str__(self) -> str:
        found = [f"{tokens:.0f} (batch {batch})" for batch, tokens in self.begins if tokens < 1e9]
        return f"contexts by FlashAttention from {', '.join(found)} tokens"


ALWAYS = Route(((1, 0.0),))


def find_route(layer: Any, runner: Any) -> Route | None:
    """Test and time both routes on one attention layer.

    Args:
        layer: vLLM's ``Attention`` layer, with its cache, which is only read.
        runner: for the dtype and the limits of the engine.

    Returns:
        Where FlashAttention reads the contexts, or ``None`` if nowhere: it is not there, cannot
        read them, is wrong here (one line in the log) or never ahead.
    """
    impl = layer.impl
    if why_no_flash_context(impl) is not None:
        return None
    route = None
    try:
        setattr(impl, ROUTE_ATTRIBUTE, ALWAYS)
        reason = trees_test(layer, runner)
        if reason is None:
            route = route_of(time_routes(layer, runner))
    except Exception as error:  # what cannot be launched must not stop the engine
        reason = f"{type(error).__name__}: {error}"
    setattr(impl, ROUTE_ATTRIBUTE, None)
    if reason is not None:
        logger.warning("vllm-ext: FlashAttention does not read the contexts of trees (%s)", reason)
    return route


def time_routes(
    layer: Any,
    runner: Any,
    batches: Sequence[int] = BATCHES,
    contexts: Sequence[int] = CONTEXTS,
) -> dict[int, dict[int, float]]:
    """Time of attention with FlashAttention over that without, by batch and context.

    Args:
        layer: as `find_route`.
        runner: as there.
        batches: those above the engine's limit are left out.
        contexts: those that do not fit into the engine or the cache are left out.
    """
    keys, _ = key_value_views(layer.kv_cache, layer.impl.head_size, layer.impl.kv_cache_dtype)
    blocks, page = keys.shape[:2]
    rows = 1 + min(_NODES, runner.num_spec_tokens)
    found: dict[int, dict[int, float]] = {}
    for batch in batches:
        for context in contexts:
            pages = -(-(context + rows) // page)
            fits = context + rows <= runner.max_model_len and batch * pages <= blocks
            if batch <= runner.max_num_reqs and fits:
                one, both = _calls(layer, runner, batch, context, rows, pages)
                found.setdefault(batch, {})[context] = _ratio(one, both, layer.kv_cache.device)
    return found


def route_of(ratios: Mapping[int, Mapping[int, float]]) -> Route | None:
    """The route for measured times.

    Args:
        ratios: time with FlashAttention over that without, by batch and context.

    Returns:
        As `find_route`.
    """
    begins = []
    for batch, by_context in sorted(ratios.items()):
        begin = math.inf
        for context, ratio in sorted(by_context.items(), reverse=True):
            if ratio > _AHEAD:
                break
            begin = float(context)
        begins.append((batch, begin))
    return Route(tuple(begins)) if any(begin < math.inf for _, begin in begins) else None


def _calls(
    layer: Any, runner: Any, batch: int, context: int, rows: int, pages: int
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Attention of one layer over random trees, by the tree kernel alone and by both."""
    impl, cache = layer.impl, layer.kv_cache
    trees = [random_tree(i, i * rows, context, rows - 1, i) for i in range(batch)]
    nothing = AttentionStep([], torch.empty(0, dtype=torch.int64), True)
    table = torch.arange(batch * pages, dtype=torch.int32, device=cache.device).view(batch, pages)
    launch = TreeLaunch(DeviceStep(trees, True, nothing, runner.processors), table)
    shape = (batch * rows, impl.num_heads, impl.head_size)
    query = torch.randn(shape, device=cache.device, dtype=runner.dtype)
    output = torch.empty_like(query)

    def call(route: Route | None) -> Callable[[], None]:
        def run() -> None:
            setattr(impl, ROUTE_ATTRIBUTE, route)
            launch.attend(impl, layer, query, cache, output)

        return run

    return call(None), call(ALWAYS)


def _ratio(one: Callable[[], None], two: Callable[[], None], device: torch.device) -> float:
    """Time of the second call over that of the first, in turns."""
    ratios = []
    for _ in range(_ROUNDS):
        first, second = (_seconds(run, device) for run in (one, two))
        ratios.append(second / first)
    return statistics.median(ratios)


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """Time until the last of many calls, queued as the layers of a model queue them, is done."""
    run()
    _wait(device)
    begin = time.perf_counter()
    for _ in range(_CALLS):
        run()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
