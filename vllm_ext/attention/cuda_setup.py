# SPDX-License-Identifier: Apache-2.0
"""Start-up on CUDA: decide whether this engine can verify trees, and prove it on this machine.

Whatever does not pass makes the engine draft chains, which the stock kernels verify.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm.config import CUDAGraphMode

from vllm_ext.attention.tree_plan import MAX_ROWS


def set_up_tree_attention(runner: Any) -> str | None:
    """Check and test the attention layers of a GPU runner.

    Args:
        runner: the runner, after its KV cache was allocated.

    Returns:
        Why branching trees are refused, or ``None`` if they can be verified.
    """
    reason = _why_not_here(runner) or _why_not_these_layers(runner)
    if reason is None:
        from vllm_ext.attention.cuda_move import make_mover

        runner.mover = make_mover(
            _target_layers(runner), runner.compilation_config.static_forward_context
        )
    return reason


def _why_not_here(runner: Any) -> str | None:
    """What rules trees out for the whole engine, or ``None``."""
    if runner.uses_mrope:
        return "M-RoPE positions"
    if getattr(runner.model_config, "rswa_window", None) is not None:
        return "reference sliding windows"
    if getattr(runner.parallel_config, "use_ubatching", False):
        return "micro-batching"
    if runner.num_spec_tokens >= MAX_ROWS:
        return f"num_speculative_tokens above {MAX_ROWS - 1}"
    compilation = runner.compilation_config
    if getattr(compilation.pass_config, "fuse_attn_quant", False):
        return "attention fused with quantisation of its output"
    mode = compilation.cudagraph_mode
    if mode is not None and mode.mixed_mode() == CUDAGraphMode.FULL:
        return f"CUDA graphs that include attention ({mode.name}; FULL_AND_PIECEWISE works)"
    return None


def _why_not_these_layers(runner: Any) -> str | None:
    from vllm_ext.attention.cuda import TreeAttention
    from vllm_ext.attention.cuda_selftest import self_test
    from vllm_ext.attention.route import Route, find_route
    from vllm_ext.attention.tree_launch import ROUTE_ATTRIBUTE

    tested: dict[tuple[Any, ...], Route | None] = {}
    for group, layer_name, layer in _layers(runner):
        impl = getattr(layer, "impl", None)
        if not isinstance(impl, TreeAttention):
            return f"attention by {type(impl).__name__} in layer {layer_name}"
        reason = impl.why_no_trees()
        if reason is None and getattr(group, "kernel_block_size", None) is not None:
            reason = "kernel blocks smaller than the cache's"
        if reason is not None:
            return f"{reason} in layer {layer_name}"
        other: Any = impl
        kind = (type(impl), other.num_heads, layer.kv_cache.shape[1:], other.sliding_window)
        if kind not in tested:
            try:
                reason = self_test(layer, group.get_metadata_builder(), runner)
            except Exception as error:  # a kernel that does not compile must not stop the engine
                reason = f"self-test: {type(error).__name__}: {error}"
            if reason is not None:
                return f"{reason} in layer {layer_name}"
            tested[kind] = find_route(layer, runner)
        setattr(impl, ROUTE_ATTRIBUTE, tested[kind])
    runner.context_routes = sorted({str(route) for route in tested.values() if route is not None})
    return None if tested else "no attention layer"


def _target_layers(runner: Any) -> list[list[str]]:
    """Names of the target's attention layers, by KV cache group."""
    draft = getattr(runner, "_draft_model", None)
    others = set(draft.layers) if draft is not None else set()  # whose rows are no tree of ours
    return [
        [name for group in groups for name in group.layer_names if name not in others]
        for groups in runner.attn_groups
    ]


def _layers(runner: Any) -> Iterator[tuple[Any, str, Any]]:
    """Attention group, name and layer of every layer with a KV cache."""
    layers = runner.compilation_config.static_forward_context
    for groups in runner.attn_groups:
        for group in groups:
            for name in group.layer_names:
                yield group, name, layers[name]
