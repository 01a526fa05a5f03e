# SPDX-License-Identifier: Apache-2.0
"""A stock CUDA attention backend, in torch, with vLLM's interface: what ours wraps in tests.

Its tensors lie on the GPU where there is one: there the kernels are compiled, not interpreted.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

HEADS, KV_HEADS, HEAD, PAGE = 4, 2, 64, 16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class StockImpl:
    """Causal attention over the paged cache [blocks, kv_heads, page, 2 * head_size]."""

    supports_quant_query_input = False

    def __init__(self, window: int = -1, dtype: str = "auto") -> None:
        self.num_heads, self.num_kv_heads, self.head_size = HEADS, KV_HEADS, HEAD
        self.scale = HEAD**-0.5
        self.attn_type = "decoder"
        self.alibi_slopes = self.sinks = self.logits_soft_cap = None
        self.sliding_window = (window - 1, 0) if window > 0 else (-1, -1)
        self.kv_cache_dtype = dtype
        self.kv_sharing_target_layer_name = None
        self.calls = 0

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, cache: Any, slots: torch.Tensor
    ) -> None:
        block, offset = slots // PAGE, slots % PAGE
        cache[block, :, offset, :HEAD] = key
        cache[block, :, offset, HEAD:] = value

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: Any = None,
    ) -> torch.Tensor:
        self.calls += 1
        starts = attn_metadata.query_start_loc.tolist()
        for request, length in enumerate(attn_metadata.seq_lens.tolist()):
            rows = slice(starts[request], starts[request + 1])
            size = rows.stop - rows.start
            slot = torch.arange(length, device=kv_cache.device)
            block = attn_metadata.block_table[request].long()[slot // PAGE]
            stored = kv_cache[block, :, slot % PAGE].repeat_interleave(HEADS // KV_HEADS, dim=1)
            score = torch.einsum("qhd,khd->hqk", query[rows], stored[..., :HEAD]) * self.scale
            distance = slot[length - size :, None] - slot[None, :]
            hidden = distance < 0
            if self.sliding_window[0] >= 0:
                hidden |= distance > self.sliding_window[0]
            weight = score.masked_fill(hidden, float("-inf")).softmax(dim=-1)
            output[rows] = torch.einsum("hqk,khd->qhd", weight, stored[..., HEAD:])
        return output


class StockBackend:
    """What vLLM's selector would return."""

    @staticmethod
    def get_name() -> str:
        return "STOCK"

    @staticmethod
    def get_impl_cls() -> type[StockImpl]:
        return StockImpl


class StockBuilder:
    """A metadata builder whose metadata is all that the stock implementation reads."""

    def build(self, common_prefix_len: int, common_attn_metadata: Any) -> Any:
        common = common_attn_metadata
        return SimpleNamespace(
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
        )


def make_layer(window: int = -1, blocks: int = 8) -> Any:
    """An attention layer with our subclass of :class:`StockImpl`."""
    from vllm_ext.attention.cuda import tree_backend

    impl: Any = tree_backend(StockBackend).get_impl_cls()  # type: ignore[attr-defined]
    return SimpleNamespace(
        impl=impl(window),
        layer_name="layer",
        kv_cache=torch.zeros(blocks, KV_HEADS, PAGE, 2 * HEAD, device=DEVICE),
        query_quant=None,
    )
