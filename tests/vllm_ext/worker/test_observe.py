# SPDX-License-Identifier: Apache-2.0
"""The quick top-k equals torch's, with the right probabilities."""

from __future__ import annotations

import functools
import logging
import sys

import pytest
import torch

from tests.vllm_ext.logs import logged
from vllm_ext.worker import observe
from vllm_ext.worker.observe import _kernel as _find
from vllm_ext.worker.observe import top_candidates


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs with the compiled kernel, for the larger vocabularies, and without it."""
    assert observe._kernel() is not None
    monkeypatch.setattr(observe, "_SMALL", 4096)
    if request.param == "torch":
        monkeypatch.setattr(observe, "_kernel", lambda: None)


@pytest.mark.parametrize("missing", ["vllm_ext.compiled", "vllm_ext.worker.observe_kernel"])
def test_without_the_compiled_form_it_says_so_once(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that is None cannot be imported."""
    monkeypatch.delitem(sys.modules, "vllm_ext.worker.observe_kernel", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    find = functools.cache(_find.__wrapped__)
    with logged(logging.WARNING) as lines:
        assert find() is None
        assert find() is None
    assert len(lines) == 1
    assert "by torch, not compiled" in lines[0]


@pytest.mark.parametrize("vocab", [96, 1000, 4096, 49152, 50257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_topk(vocab: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(5, vocab, generator=generator) * 4).to(dtype)
    ids, probs = top_candidates(logits, 8)
    expected = logits.float().softmax(-1).topk(8)
    # Values are compared: bfloat16 has ties, and which of two equal tokens comes first is free.
    torch.testing.assert_close(logits.float().softmax(-1).gather(1, ids), expected.values)
    torch.testing.assert_close(probs, expected.values, rtol=0.3, atol=0.0)
    assert all(len(set(row)) == 8 for row in ids.tolist())


def test_winners_in_one_chunk_are_all_found() -> None:
    logits = torch.zeros(1, 4096)
    logits[0, 640:648] = torch.arange(8, 0, -1).float()
    ids, _ = top_candidates(logits, 8)
    assert ids.tolist() == [list(range(640, 648))]


def test_the_normaliser_is_unbiased_and_close() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(400, 32000, generator=generator) * 2
    _, probs = top_candidates(logits, 8)
    relative = probs[:, 0] / logits.softmax(-1).amax(-1)
    assert abs(float(relative.log().mean())) < 0.01
    assert float(relative.log().std()) < 0.1


def test_a_certain_token_has_probability_one() -> None:
    for token in (16, 17):  # counted in the strided sum, and not
        logits = torch.zeros(1, 4096)
        logits[0, token] = 60.0
        assert float(top_candidates(logits, 8)[1][0, 0]) == pytest.approx(1.0)


def test_tokens_that_a_grammar_forbids() -> None:
    logits = torch.full((2, 20000), float("-inf"))
    logits[0, [3, 9000, 19999]] = torch.tensor([1.0, 3.0, 2.0])
    logits[1, 7] = -5.0
    ids, probs = top_candidates(logits, 8)
    assert ids[0, :3].tolist() == [9000, 19999, 3]
    assert ids[1, 0] == 7
    assert probs[0, 3:].tolist() == [0.0] * 5
    assert probs[1].tolist() == [1.0] + [0.0] * 7
