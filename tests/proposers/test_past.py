# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from proposers.past import BYTES_PER_TOKEN, PastSource

VOCAB = 2000


def answered(source: PastSource, name: str, tokens: list[int]) -> None:
    source.start(name, [1], greedy=True)
    source.extend(name, tokens)
    source.stop(name)


def after(source: PastSource, *tokens: int) -> dict[int, float]:
    source.start("ask", tokens, greedy=True)
    found = source.candidates(source.root("ask"))[1]
    source._answers.pop("ask")  # asking leaves no answer behind
    return found


def test_drafts_what_another_request_was_answered() -> None:
    source = PastSource(VOCAB, max_bytes=1 << 20)
    assert after(source, 10, 11, 12) == {}
    answered(source, "a", list(range(10, 20)))
    assert after(source, 10, 11, 12) == {13: 1.0}
    source.start("b", [11, 12], greedy=True)
    state = source.advance(source.root("b"), 13)
    assert source.candidates(state)[1] == {14: 1.0}


def test_a_running_request_is_not_yet_an_answer() -> None:
    source = PastSource(VOCAB, max_bytes=1 << 20)
    source.start("a", [1], greedy=True)
    source.extend("a", list(range(10, 20)))
    assert after(source, 10, 11, 12) == {}


def test_memory_is_bounded_and_old_answers_go_first() -> None:
    budget = 400 * BYTES_PER_TOKEN
    source = PastSource(VOCAB, max_bytes=budget)
    for i in range(40):
        answered(source, str(i), [i * 40 + k for k in range(40)])
        assert source.tokens * BYTES_PER_TOKEN <= budget
    assert after(source, 39 * 40, 39 * 40 + 1) == {39 * 40 + 2: 1.0}
    assert after(source, 2, 3) == {}


def test_the_stated_bytes_are_an_upper_bound() -> None:
    import tracemalloc

    tracemalloc.start()
    source = PastSource(10**6, max_bytes=1 << 24)
    before = tracemalloc.get_traced_memory()[0]
    for i in range(40):
        answered(source, str(i), [300 + (i * 7919 + k * k * 31) % 50000 for k in range(200)])
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert source.tokens > 7000
    assert used < 2 * BYTES_PER_TOKEN * source.tokens


def test_a_longer_answer_than_the_budget_is_cut() -> None:
    source = PastSource(VOCAB, max_bytes=128 * BYTES_PER_TOKEN)
    answered(source, "a", list(range(10, 1000)))
    assert source.tokens <= 128
    assert after(source, 990, 991) == {992: 1.0}


def test_too_small_a_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="max_bytes=100; it must be at least"):
        PastSource(VOCAB, max_bytes=100)
