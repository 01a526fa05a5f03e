# SPDX-License-Identifier: Apache-2.0
"""The quick top-k equals torch's, with the right probabilities."""

from __future__ import annotations

import pytest
import torch

from vllm_ext.worker.observe import top_candidates


@pytest.mark.parametrize("vocab", [96, 1000, 4096, 49152, 50257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_topk(vocab: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(5, vocab, generator=generator) * 4).to(dtype)
    ids, probs = top_candidates(logits, 8)
    expected = logits.float().softmax(-1).topk(8)
    # Values are compared: bfloat16 has ties, and which of two equal tokens comes first is free.
    torch.testing.assert_close(probs, expected.values)
    torch.testing.assert_close(logits.float().softmax(-1).gather(1, ids), expected.values)
    assert all(len(set(row)) == 8 for row in ids.tolist())


def test_winners_in_one_chunk_are_all_found() -> None:
    logits = torch.zeros(1, 4096)
    logits[0, 640:648] = torch.arange(8, 0, -1).float()
    ids, _ = top_candidates(logits, 8)
    assert ids.tolist() == [list(range(640, 648))]
