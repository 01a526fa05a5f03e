# SPDX-License-Identifier: Apache-2.0
"""Attention of one new token per row, as the target needs it while it writes on a CPU.

With grouped-query attention several query heads share one key head. transformers leaves it to torch
to expand the keys for them, and torch's kernel for CPUs then reads every key once per query head,
in bfloat16 with the speed of the slowest of its paths. One token has no causal mask, so its query
heads can as well stand where tokens stand: as G queries of one head over the same keys, which
is one call of the fast path and the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "vllm_ext_grouped"


def use(model: Any) -> None:
    """Have `model` attend so, if it attends by torch's `scaled_dot_product_attention` now."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers' function for "sdpa", with its signature.

    Args:
        module: the attention layer.
        query: [rows, heads, new tokens, head size].
        key: [rows, key heads, tokens, head size].
        value: as `key`.
        attention_mask: or `None`, where every token is seen by every new one or only causality
            hides any.
        scaling: of the scores.
        options: others of transformers.

    Returns:
        [rows, new tokens, heads, head size], and no weights.
    """
    rows, heads, new, size = query.shape
    if new > 1 or attention_mask is not None or options.get("position_bias") is not None:
        whole: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return whole
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
    found = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, scale=scaling)
    return found.reshape(rows, new, heads, value.shape[-1]), None
