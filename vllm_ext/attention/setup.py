# SPDX-License-Identifier: Apache-2.0
"""Start-up: decide whether this engine can verify trees, and prove it on this machine.

Every attention layer must be one that tree attention covers, its key layout is probed, and a
self-test compares tree attention with the stock kernel (on a chain) and with dense masked attention
(on a tree). Whatever does not pass makes the engine draft chains, in one clear log line.

There are two implementations: torch's operators, and a kernel that Numba compiles, which reads the
context once but runs on one core. The second is used where it passes the same test and is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_ext.attention.cpu import TreeCPUAttentionBackendImpl
from vllm_ext.attention.layout import LayoutError, probe
from vllm_ext.attention.selftest import seconds_per_call, self_test

logger = init_logger("vllm.vllm_ext")

_COMPILED_DTYPES = (torch.float32, torch.bfloat16)


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
    kernels = [getattr(layer.impl, "kernel", None) for layer in layers if hasattr(layer, "impl")]
    return "compiled" if kernels and None not in kernels else "by torch"


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
            impl.key_layout = probe(layer, cache)
        except LayoutError as error:
            return f"key layout unknown ({error})"
        # The dtype of a draft model's layers may not be the target's; a cache that is not quantised
        # has that of its layer.
        reason = self_test(layer, cache.dtype)
        if reason is not None:
            return reason
        impl.kernel = _faster_kernel(layer)
        tested[kind] = impl.key_layout, impl.kernel
    impl.key_layout, impl.kernel = tested[kind]
    return None


def _faster_kernel(layer: Any) -> Callable[..., None] | None:
    """The compiled kernel, if it is right and faster on this machine; ``None`` means torch."""
    impl, dtype = layer.impl, layer.kv_cache.dtype
    if not impl.key_layout.transposed or dtype not in _COMPILED_DTYPES or impl.head_size % 4:
        return None
    by_torch = seconds_per_call(layer, dtype)
    try:
        from vllm_ext.attention.cpu_kernel import attend

        impl.kernel = attend
        reason = self_test(layer, dtype)
    except Exception as error:  # no Numba, or no folder where it may keep what it compiled
        reason = str(error)
    if reason is not None:
        logger.warning("vllm-ext: tree attention by torch, not compiled: %s", reason)
        return None
    return attend if seconds_per_call(layer, dtype) < by_torch else None
