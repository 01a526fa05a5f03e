# SPDX-License-Identifier: Apache-2.0
"""The target's most likely next tokens at verified rows: what recycling sources learn from.

Every row counts, those of rejected nodes too: the target was evaluated there, and its candidates
are as good as any (Token Recycling, arXiv 2408.08696).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch

logger = logging.getLogger("vllm.vllm_ext")

_CHUNK = 64
_STRIDE = 8
_SMALL = 16384


def top_candidates(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k tokens and their probabilities, the latter estimated.

    With a large vocabulary on a CPU a full softmax is too slow for every row of a step.  The top
    k are exact: they lie in the k chunks with the largest maxima, so only those chunks are sorted.
    The normaliser sums the top k and, of all other tokens, every eighth one times eight: unbiased
    over tokens, and good enough for guesses, which is all that the probabilities are used for.

    Args:
        logits: float [rows, vocab], raw logits of the target.
        k: candidates per row.

    Returns:
        ids int64 [rows, k] and softmax probabilities float32 [rows, k], most likely first.
    """
    kernel = _kernel() if logits.is_cpu and logits.shape[1] >= _SMALL else None
    if kernel is not None and logits.dtype in (torch.float32, torch.bfloat16):
        ids = torch.empty((len(logits), k), dtype=torch.int64)
        probs = torch.empty((len(logits), k), dtype=torch.float32)
        integers = torch.uint32 if logits.dtype == torch.float32 else torch.uint16
        bits = logits.contiguous().view(integers).numpy()
        kernel(bits, _STRIDE, ids.numpy(), probs.numpy())
        return ids, probs
    logits = logits.float()
    ids, values = _top_k(logits, k)
    if not logits.is_cpu or logits.shape[1] < _SMALL:
        return ids, torch.exp(values - torch.logsumexp(logits, dim=-1, keepdim=True))
    best = values[:, :1]
    sampled = torch.exp(logits[:, ::_STRIDE] - best).sum(dim=-1, keepdim=True)
    top = torch.exp(values - best)
    counted = torch.where(ids % _STRIDE == 0, top, 0.0).sum(dim=-1, keepdim=True)
    normaliser = top.sum(dim=-1, keepdim=True) + _STRIDE * (sampled - counted).clamp_(min=0.0)
    return ids, top / normaliser


@functools.cache
def _kernel() -> Callable[..., None] | None:
    """The compiled form, or ``None`` where there is no Numba or no place for what it compiles."""
    try:
        from vllm_ext.worker.observe_kernel import top_rows
    except Exception as error:
        logger.warning("vllm-ext: top candidates by torch, not compiled: %s", error)
        return None
    kernel: Callable[..., None] = top_rows
    return kernel


def _top_k(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact top-k: ids and values, each [rows, k]."""
    rows, vocab = logits.shape
    whole = vocab // _CHUNK * _CHUNK
    if not logits.is_cpu or whole // _CHUNK <= 2 * k:
        top = logits.topk(k, dim=-1)
        return top.indices, top.values
    chunks = logits[:, :whole].view(rows, -1, _CHUNK)
    best = chunks.amax(dim=-1).topk(k, dim=-1).indices  # [rows, k]
    values = chunks.gather(1, best[..., None].expand(-1, -1, _CHUNK)).flatten(1)
    ids = (best[..., None] * _CHUNK + torch.arange(_CHUNK)).flatten(1)
    if whole < vocab:
        values = torch.cat([values, logits[:, whole:]], dim=1)
        ids = torch.cat([ids, torch.arange(whole, vocab).expand(rows, -1)], dim=1)
    top = values.topk(k, dim=-1)
    return ids.gather(1, top.indices), top.values
