# SPDX-License-Identifier: Apache-2.0
"""A CPU attention layer without an engine around it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

HEADS, KV_HEADS, HEAD = 6, 2, 64


def make_layer(dtype: torch.dtype, block_size: int, window: int | None = None) -> Any:
    """What the attention code reads of vLLM's ``Attention``, with our implementation in it."""
    from vllm_ext.attention.cpu import TreeCPUAttentionBackendImpl

    config = VllmConfig()
    config.model_config = SimpleNamespace(dtype=dtype)  # read when an impl is made
    with set_current_vllm_config(config):
        impl = TreeCPUAttentionBackendImpl(HEADS, HEAD, HEAD**-0.5, KV_HEADS, None, window, "auto")
    return SimpleNamespace(
        impl=impl,
        isa=_get_attn_isa(dtype, block_size, HEAD),
        layer_name="layer",
        kv_cache=torch.zeros(8, KV_HEADS, block_size, 2 * HEAD, dtype=dtype),
        _k_scale_float=1.0,
        _v_scale_float=1.0,
    )
