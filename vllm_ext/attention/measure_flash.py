# SPDX-License-Identifier: Apache-2.0
"""vLLM's FlashAttention in the GPU benchmark: one-token decoding, and the contexts of trees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_ext.attention.measure import Bench
from vllm_ext.attention.triton_tree import Context


@dataclass(frozen=True, slots=True)
class Flash:
    """Attention over paged caches of several lengths.

    Attributes:
        function: vLLM's ``flash_attn_varlen_func``.
        version: of FlashAttention, as vLLM would choose it here.
    """

    function: Callable[..., Any]
    version: int

    @classmethod
    def installed(cls) -> Flash | None:
        """That of the installed vLLM, if there is one with it."""
        try:
            from vllm.vllm_flash_attn import flash_attn_varlen_func, is_fa_version_supported
        except ImportError:
            return None
        hopper = torch.cuda.get_device_capability()[0] == 9
        return cls(flash_attn_varlen_func, 3 if hopper and is_fa_version_supported(3) else 2)

    def decode(self, bench: Bench) -> Callable[[], Any]:
        """One row per request."""
        starts = torch.arange(bench.batch + 1, dtype=torch.int32, device=bench.device)
        lengths = torch.full_like(starts[1:], bench.context + 1)
        query = bench.query[: bench.batch].contiguous()
        return lambda: self.function(
            q=query,
            k=bench.keys,
            v=bench.values,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            seqused_k=lengths,
            max_seqlen_k=bench.context + 1,
            softmax_scale=bench.scale,
            causal=True,
            block_table=bench.block_table,
            fa_version=self.version,
        )

    def contexts(self, bench: Bench) -> Callable[[], Context]:
        """All rows of the trees over the committed contexts."""
        rows = bench.nodes + 1
        starts = rows * torch.arange(bench.batch + 1, dtype=torch.int32, device=bench.device)
        lengths = torch.full_like(starts[1:], bench.context)
        scratch = torch.empty_like(bench.query)

        def run() -> Context:
            attended, lse = self.function(
                q=bench.query,
                k=bench.keys,
                v=bench.values,
                out=scratch,
                cu_seqlens_q=starts,
                max_seqlen_q=rows,
                seqused_k=lengths,
                max_seqlen_k=bench.context,
                softmax_scale=bench.scale,
                causal=False,
                block_table=bench.block_table,
                return_softmax_lse=True,
                fa_version=self.version,
            )
            return Context(attended, lse)

        return run
