# SPDX-License-Identifier: Apache-2.0
"""FlashAttention over a paged cache, in torch: what the CUDA build of vLLM has, where it is not."""

from __future__ import annotations

from itertools import pairwise

import torch


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_k: int,
    seqused_k: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    block_table: torch.Tensor,
    softcap: float = 0.0,
    return_softmax_lse: bool = False,
    out: torch.Tensor | None = None,
    fa_version: int = 2,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """As vLLM's function of this name. Rows without a key get what FlashAttention 2 gives them."""
    assert fa_version in (2, 3)
    starts, lengths = cu_seqlens_q.tolist(), seqused_k.tolist()
    assert max(lengths) == max_seqlen_k
    assert max(end - start for start, end in pairwise(starts)) == max_seqlen_q
    page, group = k.shape[1], q.shape[1] // k.shape[2]
    out = torch.empty_like(q) if out is None else out
    assert out.shape == q.shape
    lse = torch.full((q.shape[1], q.shape[0]), float("inf"), device=q.device)
    for request, length in enumerate(lengths):
        rows = slice(starts[request], starts[request + 1])
        slot = torch.arange(length, device=q.device)
        block = block_table[request].long()[slot // page]
        keys, values = (
            side[block, slot % page].double().repeat_interleave(group, dim=1) for side in (k, v)
        )
        score = torch.einsum("qhd,khd->hqk", q[rows].double(), keys) * softmax_scale
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        if causal:
            size = rows.stop - rows.start
            late = slot[length - size :, None] < slot[None, :]
            score.masked_fill_(late, float("-inf"))
        out[rows] = torch.einsum("hqk,khd->qhd", score.softmax(dim=-1), values).to(out.dtype)
        if length:
            lse[:, rows] = score.logsumexp(dim=-1).float()
    return (out, lse) if return_softmax_lse else out
