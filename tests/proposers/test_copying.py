# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proposers.copying import CopySource

VOCAB = 100
PROMPT = [*range(10, 40), 5]


def source(*answer: int) -> CopySource:
    made = CopySource(VOCAB)
    made.start("r", [*PROMPT, answer[0]], greedy=True)
    made.extend("r", answer[1:])
    return made


def drafts(made: CopySource, count: int) -> list[int]:
    """The best candidate, followed `count` times."""
    state, found = made.root("r"), []
    for _ in range(count):
        _, candidates = made.candidates(state)
        if not candidates:
            break
        found.append(max(candidates, key=candidates.__getitem__))
        state = made.advance(state, found[-1])
    return found


def test_follows_the_input_from_a_pair_on() -> None:
    assert drafts(source(90, 12, 13), 4) == [14, 15, 16, 17]


def test_without_a_match_there_is_no_draft() -> None:
    assert source(90, 12).candidates(source(90, 12).root("r")) == (0, {})


def test_goes_on_behind_a_replaced_token() -> None:
    """The input's 15 became 77: no suffix of the answer occurs in the input any more."""
    made = source(12, 13, 14, 77)
    bucket, found = made.candidates(made.root("r"))
    assert bucket == 4
    assert set(found) == {15, 16}
    assert found[16] > found[15]
    assert drafts(made, 3) == [16, 17, 18]


def test_goes_on_behind_an_inserted_token() -> None:
    made = source(12, 13, 14, 77)
    made.extend("r", [15])
    assert drafts(made, 2) == [16, 17]


def test_gives_up_far_from_the_copy() -> None:
    made = source(12, 13, 14, 77, 78, 79, 80, 81, 82)
    assert made.candidates(made.root("r")) == (0, {})
    made.extend("r", [30, 31])  # and finds another place
    assert drafts(made, 2) == [32, 33]


def test_prefers_the_place_ahead() -> None:
    made = CopySource(VOCAB)
    made.start("r", [1, 2, 7, 20, 21, 22, 1, 2, 8, 99], greedy=True)
    made.extend("r", [20, 21, 50, 1, 2])
    assert drafts(made, 1) == [8]  # not 7, which lies before the place already copied


def test_confidence_grows_with_the_copy() -> None:
    buckets = []
    made = source(10)
    for token in range(11, 35):
        made.extend("r", [token])
        buckets.append(made.candidates(made.root("r"))[0])
    assert buckets == sorted(buckets)
    assert (buckets[0], buckets[-1]) == (1, 3)
    assert [made.prior(b, True) for b in range(4)] == sorted(made.prior(b, True) for b in range(4))


wild = st.lists(st.integers(-2, VOCAB + 2), max_size=12)


@given(wild, st.lists(wild, max_size=4), wild)
def test_any_text(prompt: list[int], parts: list[list[int]], path: list[int]) -> None:
    made = CopySource(VOCAB)
    made.start("r", prompt, greedy=False)
    for part in parts:
        made.extend("r", part)
    state = made.root("r")
    for token in path:
        bucket, found = made.candidates(state)
        assert 0 <= bucket <= 4
        assert all(0 <= t < VOCAB for t in found)
        assert sum(found.values()) <= 1.0 + 1e-9
        state = made.advance(state, token)
    made.stop("r")
    made.stop("r")
