# SPDX-License-Identifier: Apache-2.0
"""The committed contexts of all trees by vLLM's FlashAttention, from which the tree kernel goes on.

Every row of a tree sees the whole committed context, so that part needs no mask: one non-causal
call over the paged cache that returns the log-sum-exp of each row, as vLLM makes it where a context
is spread over ranks. The kernel is FlashAttention's (arXiv 2205.14135). Attention over some keys
and its log-sum-exp are all that attention over more keys needs of them: the attention states of
FlashInfer (arXiv 2501.01005).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import vllm.envs as envs

from vllm_ext.attention.triton_tree import Context

if TYPE_CHECKING:
    from vllm_ext.attention.tree_launch import DeviceStep

PARAMETERS = (
    "q",
    "k",
    "v",
    "out",
    "cu_seqlens_q",
    "max_seqlen_q",
    "seqused_k",
    "max_seqlen_k",
    "softmax_scale",
    "causal",
    "block_table",
    "softcap",
    "return_softmax_lse",
    "fa_version",
)
"""Of FlashAttention's function, those that are passed here."""

_VERSIONS = (2, 3)  # 4 compiles kernels while requests wait


@functools.cache
def flash_attention() -> Callable[..., Any] | None:
    """vLLM's FlashAttention over variable lengths, or ``None`` where it is not built or takes other
    arguments than we know.
    """
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    known = set(PARAMETERS) <= set(inspect.signature(flash_attn_varlen_func).parameters)
    return flash_attn_varlen_func if known else None


def why_no_flash_context(impl: Any) -> str | None:
    """Why FlashAttention cannot read the contexts of a layer for the tree kernel, or ``None``.

    Args:
        impl: the layer's attention implementation, one whose trees the kernel can verify.
    """
    from vllm_ext.attention.tree_launch import is_quantised, window_of

    version = getattr(impl, "vllm_flash_attn_version", None)
    if version not in _VERSIONS or flash_attention() is None:
        return "the backend is not FlashAttention 2 or 3"
    if is_quantised(impl):
        return f"KV cache of type {impl.kv_cache_dtype}"
    if window_of(impl) >= 0:
        return "sliding window"  # it would begin where a row lies, not where its depth says
    if envs.VLLM_BATCH_INVARIANT:
        return "batch invariance"
    return None


def attend_contexts(
    impl: Any,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_table: torch.Tensor,
    step: DeviceStep,
) -> Context:
    """What each row attends to in the committed context of its request.

    Args:
        impl: the layer's attention implementation.
        query: [rows, heads, head_size], the rows of all requests one after another, and perhaps
            padding.
        keys: [blocks, page, kv_heads, head_size].
        values: as the keys.
        block_table: int32 [requests, pages].
        step: a step all of whose rows ride.

    Returns:
        The context; rows of requests that have none are undefined.
    """
    flash = flash_attention()
    assert flash is not None
    contexts = step.contexts(query.device)
    if len(query) > contexts.rows:  # padded for a CUDA graph
        query = query[: contexts.rows]
    attended, lse = flash(
        q=query,
        k=keys,
        v=values,
        out=step.scratch(query),
        cu_seqlens_q=contexts.starts,
        max_seqlen_q=step.most_rows,
        seqused_k=contexts.bases,
        max_seqlen_k=contexts.longest,
        softmax_scale=impl.scale,
        causal=False,
        block_table=block_table,
        softcap=float(impl.logits_soft_cap or 0.0),
        return_softmax_lse=True,
        fa_version=impl.vllm_flash_attn_version,
    )
    return Context(attended, lse)
