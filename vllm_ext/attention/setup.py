# SPDX-License-Identifier: Apache-2.0
"""Start-up: decide whether this engine can verify trees, and prove it on this machine.

Every attention layer must be one that tree attention covers, its key layout is probed, and a
self-test compares tree attention with the stock kernel (on a chain) and with dense masked attention
(on a tree). Whatever does not pass makes the engine draft chains, in one clear log line.
"""

from __future__ import annotations

from typing import Any

from vllm_ext.attention.cpu import TreeCPUAttentionBackendImpl
from vllm_ext.attention.layout import LayoutError, probe
from vllm_ext.attention.selftest import self_test


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
            impl.key_layout = tested[kind] = probe(layer, cache)
        except LayoutError as error:
            return f"key layout unknown ({error})"
        # The dtype of a draft model's layers may not be the target's; a cache that is not quantised
        # has that of its layer.
        reason = self_test(layer, cache.dtype)
        if reason is not None:
            return reason
    impl.key_layout = tested[kind]
    return None
