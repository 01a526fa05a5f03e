# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.vllm_ext.distill.test_student import tiny_gemma
from vllm_ext.distill import grouped
from vllm_ext.distill.teacher import Answer, Labelled, Stream, _draw, read, write

END = 1


def streams(*prompts: list[int], temperature: float = 1.0, longest: int = 5) -> list[Stream]:
    return [Stream(itertools.repeat(p), [END], longest, temperature) for p in prompts]


def written(target: Any, writers: list[Any], length: int = 24, seed: int = 0) -> Labelled:
    return write(target, writers, length, 8, torch.Generator().manual_seed(seed))


def test_writing_labels_as_reading_does(target: Any) -> None:
    """Token by token with a cache, or all at once: the target says the same."""
    made = written(target, streams([5, 6, 7], [8, 9], [10, 11, 12, 13, 14]))
    again = read(target, made.tokens.long(), 8, 2)
    assert torch.equal(made.tokens, again.tokens)
    assert torch.equal(made.ids[..., 0], again.ids[..., 0])
    torch.testing.assert_close(made.probs.float(), again.probs.float(), rtol=1e-2, atol=1e-3)
    assert made.ids.shape == made.probs.shape == (3, 24, 8)


def test_layers_with_windows_write_as_they_read() -> None:
    """Rows longer than a window, whose layers keep transformers' cache and get masks."""
    model = tiny_gemma()
    grouped.use(model)
    made = written(model, streams([5, 6, 7], [8, 9]))
    again = read(model, made.tokens.long(), 8, 2)
    torch.testing.assert_close(made.probs.float(), again.probs.float(), rtol=1e-2, atol=1e-3)


def test_labels_are_the_targets_distribution(target: Any) -> None:
    tokens = torch.arange(2, 26).reshape(2, 12)
    made = read(target, tokens, 258, 2)
    with torch.inference_mode():
        wanted = target(tokens).logits.softmax(-1)
    found = torch.zeros_like(wanted).scatter(2, made.ids.long(), made.probs.float())
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


def test_greedy_rows_follow_the_target_and_prompts_are_forced(target: Any) -> None:
    made = written(target, streams([5, 6, 7], [8, 9], temperature=0.0))
    for row, prompt in zip(made.tokens.tolist(), ([5, 6, 7], [8, 9]), strict=True):
        assert row[: len(prompt)] == prompt
        best = made.ids[made.tokens.tolist().index(row), :, 0].tolist()
        place = len(prompt)
        assert row[place : place + 4] == best[place - 1 : place + 3]


def test_the_seed_decides(target: Any) -> None:
    rows = [written(target, streams([5, 6], [7, 8]), seed=seed).tokens for seed in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_a_prompt_longer_than_a_row_is_cut(target: Any) -> None:
    made = written(target, streams(list(range(2, 40))), length=6)
    assert made.tokens.tolist() == [[2, 3, 4, 5, 6, 7]]


def test_a_stream_goes_on_with_the_next_prompt() -> None:
    stream = Stream(iter([[10, 11], [20, 21], [30]]), [END, 2], 3, 0.0)
    assert stream.known() == [10, 11]
    # An answer that ends by itself, then one that is cut off after three tokens and ended.
    drawn = [40, 2, 99, 99, 41, 42, 43, 99, 99, 44]
    assert [stream.next(token) for token in drawn] == [40, 2, 20, 21, 41, 42, 43, END, 30, 44]


def test_an_answer_stops_at_its_end() -> None:
    answer = Answer([5], [END, 2], 4, 0.0)
    assert [answer.next(token) for token in (7, 2, 8)] == [7, 2, END]
    assert answer.tokens == [7, 2]
    full = Answer([5], [END], 2, 0.0)
    assert [full.next(token) for token in (7, 8, 9)] == [7, 8, END]
    assert full.tokens == [7, 8]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_distribution(temperature: float) -> None:
    law = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    count = 20000
    heat = torch.full((count, 1), temperature)
    drawn = _draw(law.log().expand(count, -1), heat, torch.Generator().manual_seed(0))
    wanted = law ** (1 / temperature)
    wanted /= wanted.sum()
    found = torch.bincount(drawn, minlength=5) / count
    assert ((found - wanted).abs() <= 4 * (wanted * (1 - wanted) / count).sqrt()).all()


def test_cold_rows_are_greedy_beside_warm_ones() -> None:
    logits = torch.tensor([[1.0, 1.01, 0.9]]).expand(400, -1)
    heat = torch.tensor([0.0, 1.0] * 200)[:, None]
    drawn = _draw(logits, heat, torch.Generator().manual_seed(0))
    assert (drawn[::2] == 1).all()
    assert len(drawn[1::2].unique()) == 3
