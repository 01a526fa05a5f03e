# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from proposers.hydra import HydraHead
from tests.vllm_ext.heads.clock import ticking
from vllm_ext.heads.features import Features
from vllm_ext.heads.training import (
    HeadSettings,
    _losses,
    fit,
    frequent,
    judged,
    placed,
)

VOCAB, SIZE = 24, 16
SETTINGS = HeadSettings(tokens=VOCAB, inner=32, depth=3, rows=64, rate=1e-2)


def nothing(seconds: float, doing: str) -> None:
    pass


def cycling(texts: int, length: int, greedy: bool) -> tuple[Features, Tensor]:
    """A target that counts upwards by the text's own stride, which only its states tell.

    Returns the features, and the tokens' embeddings.
    """
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(VOCAB, SIZE, generator=generator)
    strides = 1 + torch.arange(texts) % 3
    begin = torch.randint(VOCAB, (texts,), generator=generator)
    token = (begin[:, None] + strides[:, None] * torch.arange(length)) % VOCAB
    states = embeddings[token] + 3 * torch.nn.functional.one_hot(strides, SIZE)[:, None]
    # A place's distribution is of its own token, and a little of another one.
    ids = torch.stack([token, (token + 1) % VOCAB], dim=-1).reshape(-1, 2)
    return Features(
        hidden=states.reshape(-1, SIZE).to(torch.bfloat16),
        token=token.flatten(),
        ids=ids,
        probs=torch.tensor([0.9, 0.05], dtype=torch.float16).expand(len(ids), 2),
        left=torch.arange(length, 0, -1).repeat(texts),
        greedy=torch.full((texts * length,), greedy),
    ), embeddings


def fitted(features: Features, embeddings: Tensor, steps: int, **changes: object) -> HydraHead:
    return fit(
        features,
        torch.arange(VOCAB),
        embeddings,
        embeddings,
        replace(SETTINGS, **changes),
        float(steps),
        nothing,
        ticking(1.0),
    )


def test_the_head_learns_what_only_states_tell() -> None:
    features, embeddings = cycling(60, 12, greedy=True)
    trained = judged(fitted(features, embeddings, 300), features, 3)["greedy"]
    assert [one.first > 0.9 for one in trained] == [True, True, True]
    assert [one.places for one in trained] == [60 * 9] * 3
    # Control: states of other texts tell nothing, and a third is the share of the best stride.
    shuffled = replace(features, hidden=features.hidden[torch.randperm(len(features))])
    guessed = judged(fitted(shuffled, embeddings, 300), features, 3)["greedy"]
    assert guessed[0].first < 0.6


def test_a_seed_repeats_and_time_decides() -> None:
    features, embeddings = cycling(6, 8, greedy=False)
    first, again = (fitted(features, embeddings, 5) for _ in range(2))
    other = fitted(features, embeddings, 5, seed=1)
    assert torch.equal(first.outer, again.outer)
    assert not torch.equal(first.outer, other.outer)
    steps = []
    fit(
        features,
        torch.arange(VOCAB),
        embeddings,
        embeddings,
        SETTINGS,
        4.0,
        lambda seconds, doing: steps.append(doing),
        ticking(1.0),
    )
    assert len(steps) == 4
    assert steps[-1].startswith("step 4, epoch 6.1, loss ")


def test_the_loss_is_the_cross_entropy_over_known_tokens_and_one_class() -> None:
    features, embeddings = cycling(1, 4, greedy=False)
    tokens = torch.tensor([t for t in range(VOCAB) if t != features.token[2]])
    head = fit(features, tokens, embeddings, embeddings[tokens], SETTINGS, 0.0, nothing)
    chosen = torch.tensor([0, 3])  # the last place has no token behind it
    places = placed(features, tokens)
    losses = _losses(head, head.inputs.__getitem__, places, chosen, 3)
    place = {int(t): i for i, t in enumerate(tokens)}
    state = features.hidden[:1].float()
    expected = []
    for k in (1, 2, 3):
        state = head.step(state, features.token[k - 1 : k])
        log_q = head.logits(state)[0].log_softmax(-1)
        rest, said = 1.0, 0.0
        for token, prob in zip(features.ids[k].tolist(), features.probs[k].tolist(), strict=True):
            if token in place:
                said += prob * log_q[place[token]].item()
                rest -= prob
        expected.append(-(said + rest * log_q[-1].item()))
    assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-4)
    assert len(losses) == 3


def test_what_a_head_cannot_draft_counts_as_missed() -> None:
    features, embeddings = cycling(30, 12, greedy=False)
    head = fitted(features, embeddings, 300)
    kept = torch.arange(0, VOCAB, 2)
    rows = [*kept.tolist(), VOCAB]
    half = replace(head, tokens=kept, outputs=head.outputs[rows], bias=head.bias[rows])
    all_known, found = (judged(one, features, 2)["sampled"] for one in (head, half))
    assert all_known[0].first > 0.8
    assert found[0].first < 0.7 * all_known[0].first
    assert found[0].own == pytest.approx(0.9, abs=1e-3)


def test_frequent_tokens_are_those_that_the_target_expects() -> None:
    features, _ = cycling(1, 3, greedy=False)
    wanted = set(features.token.tolist())
    assert set(frequent(features, VOCAB, 3).tolist()) == wanted
    assert len(frequent(features, VOCAB, 999)) == VOCAB
