# SPDX-License-Identifier: Apache-2.0
"""Start-up: decide whether this engine can verify trees, and prove it on this machine.

Every attention layer must be one that tree attention covers, its cache layout is probed, and a
self-test compares tree attention with the stock kernel (on a chain) and with dense masked attention
(on a tree). Whatever does not pass makes the engine draft chains, in one clear log line.

Torch's operators can do it anywhere. Kernels that Numba compiles, for vector units and for matrix
tiles, read the context once but run on one core; the one that knows the cache's packing is used
where it passes the same test and is faster.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_ext.attention.cpu import Kernel, TreeCPUAttentionBackendImpl
from vllm_ext.attention.layout import PAIRS, ROWS, LayoutError, probe
from vllm_ext.attention.selftest import seconds_per_call, self_test

logger = init_logger("vllm.vllm_ext")

_TILES = "vllm_ext.attention.amx_kernel"
_KERNELS = {
    (ROWS, torch.float32): "vllm_ext.attention.cpu_kernel",
    (ROWS, torch.bfloat16): "vllm_ext.attention.cpu_kernel",
    (PAIRS, torch.bfloat16): _TILES,
}
"""Modules with a `Kernel` called ``tree_attention``, by packing and dtype of the cache."""


def set_up_tree_attention(runner: Any) -> str | None:
    """Probe and test the attention layers of a CPU runner.

    Args:
        runner: the runner, after its KV cache was allocated.

    Returns:
        Why branching trees are refused, or ``None`` if they can be verified.
    """
    if runner.uses_mrope:
        return "M-RoPE positions"
    layers = runner.compilation_config.static_forward_context
    tested: dict[tuple[Any, ...], Any] = {}
    for group in runner.kv_cache_config.kv_cache_groups:
        for name in group.layer_names:
            reason = _set_up_layer(layers[name], tested)
            if reason is not None:
                return f"{reason} in layer {name}"
    return None if tested else "no attention layer"


def describe_tree_attention(runner: Any) -> str:
    """What computes tree rows, for the log line at start-up."""
    layers = runner.compilation_config.static_forward_context.values()
    kernels = {getattr(layer.impl, "kernel", None) for layer in layers if hasattr(layer, "impl")}
    if not kernels or None in kernels:
        return "by torch"
    tiles = any(kernel.__module__ == _TILES for kernel in kernels)
    return "compiled for matrix tiles" if tiles else "compiled"


def _set_up_layer(layer: Any, tested: dict[tuple[Any, ...], Any]) -> str | None:
    impl = layer.impl
    if not isinstance(impl, TreeCPUAttentionBackendImpl):
        return f"attention by {type(impl).__name__}"
    reason = impl.why_no_trees()
    if reason is not None:
        return reason
    cache = layer.kv_cache
    kind = (tuple(cache.shape[1:]), cache.dtype, layer.isa, impl.num_heads, impl.sliding_window)
    if kind not in tested:
        try:
            impl.layout = probe(layer, cache)
        except LayoutError as error:
            return f"cache layout unknown ({error})"
        # The dtype of a draft model's layers may not be the target's; a cache that is not quantised
        # has that of its layer.
        reason = self_test(layer, cache.dtype)
        if reason is not None:
            return reason
        impl.kernel = _faster_kernel(layer)
        tested[kind] = impl.layout, impl.kernel
    impl.layout, impl.kernel = tested[kind]
    return None


def _faster_kernel(layer: Any) -> Kernel | None:
    """The compiled kernel, if it is right and faster on this machine; ``None`` means torch."""
    impl, dtype = layer.impl, layer.kv_cache.dtype
    name = _KERNELS.get((impl.layout.packing, dtype))
    if name is None or impl.head_size % 4:
        return None
    by_torch = seconds_per_call(layer, dtype)
    try:
        kernel: Kernel = importlib.import_module(name).tree_attention
        impl.kernel = kernel
        reason = self_test(layer, dtype)
    except Exception as error:  # no Numba, or no folder where it may keep what it compiled
        reason = str(error)
    if reason is not None:
        logger.warning("vllm-ext: tree attention by torch, not compiled: %s", reason)
        return None
    return kernel if seconds_per_call(layer, dtype) < by_torch else None
