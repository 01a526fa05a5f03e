# SPDX-License-Identifier: Apache-2.0
"""Forward KL from the target to the student where only the target's best tokens are stored.

The vocabulary of a position is coarsened to the stored tokens, one by one, and all others together
(the *tail*). With p the target, q the student and t the tail:

    KL = sum_i p_i log(p_i / q_i) + p_t log(p_t / q_t),    p_t = 1 - sum_i p_i,  q_t likewise

Coarsening can only lower a KL, so this is a lower bound of the full one, and equal to it when all
tokens are stored. Forward KL, as in DistillSpec (arXiv 2310.08461): the student must cover what the
target may say, and the gradient is that of cross-entropy with soft labels.

On a CPU the output layer costs more than a small student's layers, so the student's normaliser is
not computed over the vocabulary but over *candidates*: every token that is stored for some position
of the batch, and a uniform sample of the others, weighted by the inverse of its chance (importance
sampling). The sum, not its logarithm, is estimated without bias; it is exact when the sample takes
all others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST_TAIL = 1e-6


@dataclass(frozen=True)
class Candidates:
    """The tokens over which a batch is normalised.

    Attributes:
        tokens: their ids, int64 [C].
        log_weight: logarithm of how many tokens each of them stands for, float32 [C].
        slots: where the stored tokens of each position are in `tokens`, int64 [positions, k].
    """

    tokens: Tensor
    log_weight: Tensor
    slots: Tensor


def candidates(ids: Tensor, vocab: int, others: int, generator: torch.Generator) -> Candidates:
    """All tokens of `ids` and at most `others` of those that are not in it.

    Args:
        ids: stored tokens of each position, int64 [positions, k].
        vocab: size of the vocabulary.
        others: how many tokens are sampled from the rest of the vocabulary.
        generator: on the CPU, wherever `ids` lie.
    """
    wanted = torch.zeros(vocab, dtype=torch.bool, device=ids.device)
    wanted[ids.reshape(-1)] = True
    stored = wanted.nonzero().squeeze(1)
    order = torch.randperm(vocab, generator=generator).to(ids.device)
    sampled = order[~wanted[order]][:others]
    log_weight = torch.zeros(len(stored) + len(sampled), device=ids.device)
    if len(sampled):
        log_weight[len(stored) :] = math.log((vocab - len(stored)) / len(sampled))
    place = torch.empty(vocab, dtype=torch.int64, device=ids.device)
    place[stored] = torch.arange(len(stored), device=ids.device)
    return Candidates(torch.cat([stored, sampled]), log_weight, place[ids])


def forward_kl(logits: Tensor, probs: Tensor, chosen: Candidates) -> Tensor:
    """Mean over positions of the coarsened KL, in nats.

    Args:
        logits: the student's, over `chosen.tokens`, float32 [positions, C].
        probs: the target's, of the stored tokens, float32 [positions, k]; sums are at most 1 but
            for rounding.
        chosen: from `candidates`, of the same positions.
    """
    log_norm = torch.logsumexp(logits + chosen.log_weight, dim=-1, keepdim=True)
    log_q = logits.gather(1, chosen.slots) - log_norm
    tail_p = (1 - probs.sum(-1)).clamp(min=0)
    tail_q = (1 - log_q.exp().sum(-1)).clamp(min=_LEAST_TAIL)
    stored = torch.xlogy(probs, probs) - probs * log_q
    tail = torch.xlogy(tail_p, tail_p) - tail_p * tail_q.log()
    return (stored.sum(-1) + tail).mean()
