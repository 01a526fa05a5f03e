# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from vllm_ext.distill.loss import Candidates, candidates, forward_kl

VOCAB = 40
POSITIONS = 6


@pytest.fixture
def models() -> tuple[Tensor, Tensor]:
    """Log probabilities of a target and logits of a student."""
    generator = torch.Generator().manual_seed(0)
    target = 2 * torch.randn(POSITIONS, VOCAB, generator=generator)
    student = 2 * torch.randn(POSITIONS, VOCAB, generator=generator)
    return target.log_softmax(-1), student


def full(log_p: Tensor, logits: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1).mean()


def coarse(
    log_p: Tensor, logits: Tensor, k: int, others: int = VOCAB, seed: int = 0
) -> tuple[Tensor, Candidates]:
    best = log_p.topk(k)
    chosen = candidates(best.indices, VOCAB, others, torch.Generator().manual_seed(seed))
    return forward_kl(logits[:, chosen.tokens], best.values.exp(), chosen), chosen


def test_with_all_tokens_stored_it_is_the_full_kl(models: tuple[Tensor, Tensor]) -> None:
    value, chosen = coarse(*models, k=VOCAB)
    assert value.item() == pytest.approx(full(*models).item(), rel=1e-5)
    assert len(chosen.tokens) == VOCAB


def test_so_are_its_gradients(models: tuple[Tensor, Tensor]) -> None:
    log_p, logits = models
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    coarse(log_p, mine, k=VOCAB)[0].backward()
    full(log_p, theirs).backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_fewer_tokens_bound_it_from_below(models: tuple[Tensor, Tensor]) -> None:
    values = [coarse(*models, k=k)[0].item() for k in (1, 2, 4, 8, 16, 32, VOCAB)]
    assert values == sorted(values)
    assert values[0] < 0.7 * values[-1]


def test_it_is_the_kl_of_the_coarsened_distributions(models: tuple[Tensor, Tensor]) -> None:
    log_p, logits = models
    ids = log_p.topk(3).indices

    def parts(log_probs: Tensor) -> Tensor:
        stored = log_probs.exp().gather(1, ids)
        return torch.cat([stored, 1 - stored.sum(-1, keepdim=True)], dim=1)

    p, q = parts(log_p), parts(logits.log_softmax(-1))
    wanted = (p * (p / q).log()).sum(-1).mean().item()
    assert coarse(log_p, logits, k=3)[0].item() == pytest.approx(wanted, rel=1e-4)


def test_a_student_that_is_the_target_has_none(models: tuple[Tensor, Tensor]) -> None:
    log_p, _ = models
    assert coarse(log_p, log_p + 3.0, k=4)[0].item() == pytest.approx(0.0, abs=1e-5)


def test_candidates_are_the_stored_tokens_and_different_others() -> None:
    ids = torch.tensor([[7, 3], [3, 9]])
    chosen = candidates(ids, VOCAB, 5, torch.Generator().manual_seed(0))
    assert chosen.tokens[:3].tolist() == [3, 7, 9]
    others = chosen.tokens[3:].tolist()
    assert len(set(others)) == 5
    assert not {3, 7, 9} & set(others)
    assert chosen.tokens[chosen.slots].tolist() == ids.tolist()
    # Together they stand for the whole vocabulary.
    assert chosen.log_weight.exp().sum().item() == pytest.approx(VOCAB)


def test_the_sampled_normaliser_is_unbiased(models: tuple[Tensor, Tensor]) -> None:
    log_p, logits = models
    ids = log_p.topk(2).indices
    exact = logits.exp().sum(-1)
    drawn, unweighted = [], []
    for seed in range(1500):
        chosen = candidates(ids, VOCAB, 6, torch.Generator().manual_seed(seed))
        values = logits[:, chosen.tokens].exp()
        drawn.append((values * chosen.log_weight.exp()).sum(-1))
        unweighted.append(values.sum(-1))
    mean = torch.stack(drawn).mean(0)
    error = torch.stack(drawn).std(0) / len(drawn) ** 0.5
    assert ((mean - exact).abs() < 4 * error).all()
    # Control: without the weights it is far off.
    assert ((torch.stack(unweighted).mean(0) - exact).abs() > 20 * error).any()


def test_weights_matter_to_the_loss(models: tuple[Tensor, Tensor]) -> None:
    log_p, logits = models
    ids = log_p.topk(2).indices
    chosen = candidates(ids, VOCAB, 6, torch.Generator().manual_seed(0))
    probs = log_p.gather(1, ids).exp()
    without = dataclasses.replace(chosen, log_weight=torch.zeros_like(chosen.log_weight))
    shown = logits[:, chosen.tokens]
    assert forward_kl(shown, probs, chosen) != forward_kl(shown, probs, without)


def test_rounded_probabilities_above_one_are_harmless() -> None:
    chosen = candidates(torch.tensor([[0, 1]]), 4, 4, torch.Generator())
    logits = torch.tensor([[20.0, 20.0, -20.0, -20.0]], requires_grad=True)
    value = forward_kl(logits, torch.tensor([[0.5005, 0.5]]), chosen)
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-2)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
