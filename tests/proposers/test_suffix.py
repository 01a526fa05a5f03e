# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proposers import SuffixSource

LENGTH = 12


def matches(text: list[int], path: list[int]) -> dict[int, int]:
    """Every position of `text` whose left context agrees with text + path, and how far."""
    context = text + path
    found = {}
    for position in range(1, len(text)):
        length = 0
        while (
            length < min(LENGTH, position) and text[position - 1 - length] == context[-1 - length]
        ):
            length += 1
        if length:
            found[position] = length
    return found


def votes(text: list[int], found: dict[int, int]) -> dict[int, float]:
    weight: dict[int, float] = {}
    for position, length in found.items():
        weight[text[position]] = weight.get(text[position], 0.0) + 4.0**length
    total = sum(weight.values())
    return {token: w / total for token, w in weight.items()}


texts = st.lists(st.integers(0, 3), min_size=1, max_size=40)


@settings(deadline=None)
@given(texts, st.lists(st.integers(0, 4), max_size=4), st.integers(0, 40))
def test_equals_a_brute_force_matcher(text: list[int], path: list[int], cut: int) -> None:
    # With room for every match, only those that carry next to no weight may be left out.
    source = SuffixSource(100, max_matches=1000, max_length=LENGTH)
    source.start("r", text[:cut], greedy=True)
    source.extend("r", text[cut:])
    state = source.root("r")
    for token in path:
        state = source.advance(state, token)
    bucket, got = source.candidates(state)
    found = matches(text, path)
    expected = votes(text, found)
    assert (bucket == 0) == (not found)
    # At most 40 matches, each at least 4^3 times lighter than the longest.
    share = 40 / 4**3
    for token in expected.keys() | got.keys():
        low = expected.get(token, 0.0)
        assert abs(got.get(token, 0.0) - low) <= share / (1 + share)
    longest = max(found.values(), default=0)
    sure = {text[p] for p, m in found.items() if m > longest - 3}
    assert sure <= got.keys()
    exact = {p: m for p, m in found.items() if m > longest - 3}
    if len(exact) == len(found):
        assert got == pytest.approx(expected)


def test_a_longer_match_outweighs_a_shorter_one() -> None:
    source = SuffixSource(100)
    source.start("r", [1, 2, 3, 50, 9, 3, 60, 8, 3, 61, 1, 2, 3], greedy=True)
    bucket, found = source.candidates(source.root("r"))
    assert bucket == 3
    assert max(found, key=found.__getitem__) == 50
    assert found == pytest.approx({50: 64 / 72, 60: 4 / 72, 61: 4 / 72})


def test_work_is_bounded_by_the_cap() -> None:
    source = SuffixSource(100, max_matches=3)
    source.start("r", [7, 1, 7, 2, 7, 3, 7, 4, 7, 5, 7], greedy=True)
    found = source.candidates(source.root("r"))[1]
    assert set(found) == {5, 4, 3}  # the latest ones


def test_tokens_outside_the_vocabulary_match_but_are_not_drafted() -> None:
    source = SuffixSource(10)
    source.start("r", [1, 99, 99, 5, -3, 1, 99, 99], greedy=True)
    bucket, found = source.candidates(source.root("r"))
    assert bucket == 3
    assert set(found) == {5}
    source.extend("r", [5])
    assert source.candidates(source.root("r")) == (0, {})


def test_empty_and_single_token_requests() -> None:
    source = SuffixSource(10)
    for text in ([], [3]):
        source.start("r", text, greedy=True)
        assert source.candidates(source.root("r")) == (0, {})
        assert source.candidates(source.advance(source.root("r"), 3)) == (0, {})


def test_only_the_window_of_a_long_prompt_is_indexed() -> None:
    source = SuffixSource(10**6, window=100)
    text = [*range(1000), 5]
    source.start("r", text, greedy=True)
    assert source.candidates(source.root("r")) == (0, {})
    source.start("r", [*range(1000), 950], greedy=True)
    assert source.candidates(source.root("r"))[1] == {951: 1.0}


def test_long_prompts_are_indexed_quickly() -> None:
    source = SuffixSource(10**6)
    text = [(i * i) % 997 for i in range(100_000)]
    start = time.process_time()
    source.start("r", text[:2000], greedy=True)
    short = time.process_time() - start
    start = time.process_time()
    source.start("r", text, greedy=True)
    source.extend("r", text[:10])
    assert source.candidates(source.root("r"))[0] > 0
    long = time.process_time() - start
    # Five times the budgets of 10 ms and, for the window of 32k tokens, of 160 ms.
    assert short < 0.05
    assert long < 0.8


@pytest.mark.parametrize("bad", [{"max_matches": 0}, {"window": 0}, {"max_length": 3}])
def test_bad_arguments_are_refused(bad: dict[str, int]) -> None:
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        SuffixSource(10, **bad)


def test_the_shortest_allowed_reach_works() -> None:
    source = SuffixSource(10, max_length=4)
    source.start("r", [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5], greedy=True)
    state = source.root("r")
    assert source.candidates(state) == (4, {6: 1.0})
    assert source.candidates(source.advance(state, 6)) == (4, {1: 1.0})
