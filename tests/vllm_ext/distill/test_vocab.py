# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from vllm_ext.distill.teacher import Labelled
from vllm_ext.distill.vocab import SHARE, frequent
from vllm_ext.draft_vocab import LEAST

VOCAB = 400


def labelled(ids: list[list[int]], probs: list[list[float]]) -> Labelled:
    """One sequence."""
    return Labelled(
        torch.zeros((1, len(ids)), dtype=torch.int32),
        torch.tensor([ids], dtype=torch.int32),
        torch.tensor([probs], dtype=torch.float16),
    )


def test_the_likely_tokens_the_ends_and_then_the_lowest() -> None:
    data = labelled([[350, 340], [340, 330]], [[0.5, 0.25], [0.75, 0.125]])
    kept = frequent(data, VOCAB, [399])
    assert len(kept) == VOCAB // SHARE
    assert kept == [*range(96), 330, 340, 350, 399]


def test_mass_counts_and_not_how_often_a_token_is_listed() -> None:
    many = [[200 + i] for i in range(98)] + [[350]] * 3 + [[351]]
    probs = [[0.5]] * 98 + [[0.125]] * 3 + [[0.5]]
    kept = frequent(labelled(many, probs), VOCAB, [0])
    assert 351 in kept
    assert 350 not in kept


def test_a_small_vocabulary_is_kept_whole() -> None:
    kept = frequent(labelled([[5]], [[0.5]]), LEAST - 1, [2])
    assert kept == list(range(LEAST - 1))
