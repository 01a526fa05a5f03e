# SPDX-License-Identifier: Apache-2.0
"""How long attention takes on this machine by context, for the cost model.

The dummy passes that measure what rows cost leave attention out. So one layer of each kind is timed
on the self-test's scratch cache, plain decoding at two contexts and a tree, and multiplied by the
number of such layers. The online corrections start from here.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from proposers.cost_model import AttentionCost
from proposers.tree import TokenTree
from vllm_ext.attention.selftest import _Case

_NODES = 8
_LONG = 1024
_SHORT = 64
_ROUNDS = 5


@torch.inference_mode()
def time_attention(runner: Any) -> AttentionCost:
    """Time the attention layers of a CPU runner whose trees have passed the self-test.

    Args:
        runner: the runner, after its KV cache was allocated.
    """
    layers = runner.compilation_config.static_forward_context
    found: dict[tuple[Any, ...], Any] = {}
    count: Counter[tuple[Any, ...]] = Counter()
    for group in runner.kv_cache_config.kv_cache_groups:
        for name in group.layer_names:
            layer = layers[name]
            impl, cache = layer.impl, layer.kv_cache
            kind = (tuple(cache.shape[1:]), cache.dtype, impl.num_heads, impl.sliding_window)
            found.setdefault(kind, layer)
            count[kind] += 1
    long = min(_LONG, runner.max_model_len - _NODES - 1)
    sums = [0.0, 0.0, 0.0]
    for kind, layer in found.items():
        times = _time_layer(layer, min(_SHORT, long // 2), long)
        sums = [total + count[kind] * seconds for total, seconds in zip(sums, times, strict=True)]
    return AttentionCost(*sums)


def _time_layer(layer: Any, short: int, long: int) -> tuple[float, float, float]:
    """Seconds of one layer per token of context, per drafted row and token of context, and per tree
    with branches.
    """
    if short < 1:
        return 0.0, 0.0, 0.0
    generator = torch.Generator().manual_seed(0)
    dtype = layer.kv_cache.dtype
    # Two rows, and a root with branches: the stock kernel takes the first, trees the second.
    plain = TokenTree.chain([0], [0.5])
    bush = TokenTree(tuple(range(_NODES)), (-1,) * _NODES, (0.5,) * _NODES)
    few = _best(_Case(layer, dtype, short, plain, generator).stock)
    many = _best(_Case(layer, dtype, long, plain, generator).stock)
    tree = _best(_Case(layer, dtype, long, bush, generator).tree_attention)
    small = _best(_Case(layer, dtype, short, bush, generator).tree_attention)
    per_drafted = max(0.0, tree - many) / (_NODES * long)
    return (
        max(0.0, many - few) / (long - short),
        per_drafted,
        max(0.0, small - per_drafted * _NODES * short),
    )


def _best(call: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best
