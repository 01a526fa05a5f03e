# SPDX-License-Identifier: Apache-2.0
"""Which tokens a draft may draft: the most frequent ones (FR-Spec, arXiv 2502.14856).

The paper counts tokens of a corpus. Here the target's own distributions on its own answers are
summed, which tell of rare tokens more than as many draws do. Among tokens that it never thought of,
those of lower id come first: tokenizers learn frequent tokens first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_ext.distill.teacher import Labelled
from vllm_ext.draft_vocab import LEAST

SHARE = 4
"""One token in so many is drafted, as in the paper."""


def frequent(data: Labelled, vocab: int, ends: Sequence[int]) -> list[int]:
    """The tokens, ascending.

    Args:
        data: labelled sequences.
        vocab: size of the vocabulary.
        ends: tokens that end an answer, which are always among them.
    """
    mass = torch.zeros(vocab, dtype=torch.float64)
    for ids, probs in zip(data.ids, data.probs, strict=True):
        mass.index_add_(0, ids.flatten().long(), probs.flatten().double())
    mass[list(ends)] = torch.inf
    keep = min(vocab, max(LEAST, vocab // SHARE))
    return sorted(mass.argsort(descending=True, stable=True)[:keep].tolist())
