# SPDX-License-Identifier: Apache-2.0
"""The target's most likely next tokens at verified rows: what recycling sources learn from.

Every row counts, those of rejected nodes too: the target was evaluated there, and its candidates
are as good as any (Token Recycling, arXiv 2408.08696).
"""

from __future__ import annotations

import torch

_CHUNK = 64


def top_candidates(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k tokens and their probabilities.

    Exact and quicker than ``topk`` over a large vocabulary on a CPU: a token of the overall top k
    lies in one of the k chunks with the largest maxima, so only those chunks are sorted.

    Args:
        logits: float [rows, vocab], raw logits of the target.
        k: candidates per row.

    Returns:
        ids int64 [rows, k] and softmax probabilities float32 [rows, k], most likely first.
    """
    logits = logits.float()
    rows, vocab = logits.shape
    normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
    whole = vocab // _CHUNK * _CHUNK
    if logits.is_cpu and whole // _CHUNK > 2 * k:
        chunks = logits[:, :whole].view(rows, -1, _CHUNK)
        best = chunks.amax(dim=-1).topk(k, dim=-1).indices  # [rows, k]
        values = chunks.gather(1, best[..., None].expand(-1, -1, _CHUNK)).flatten(1)
        ids = (best[..., None] * _CHUNK + torch.arange(_CHUNK)).flatten(1)
        if whole < vocab:
            values = torch.cat([values, logits[:, whole:]], dim=1)
            ids = torch.cat([ids, torch.arange(whole, vocab).expand(rows, -1)], dim=1)
        top = values.topk(k, dim=-1)
        return ids.gather(1, top.indices), torch.exp(top.values - normaliser)
    top = logits.topk(k, dim=-1)
    return top.indices, torch.exp(top.values - normaliser)
