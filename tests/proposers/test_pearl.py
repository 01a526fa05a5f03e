# SPDX-License-Identifier: Apache-2.0
"""PEARL's state machine against a simulation that is written from the paper's rounds."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proposers.pearl import Overlap, Pearl, Phase, chunk_length

VOCAB = 3


def target(text: Sequence[int]) -> int:
    """The target's next token: a fixed function of the text."""
    return (sum(3 * t + 1 for t in text[-4:]) + len(text) * len(text)) % VOCAB


class Draft:
    """Says what the target says, but for a share of contexts chosen by a hash."""

    def __init__(self, wrong: float, seed: int = 0) -> None:
        self.wrong, self.seed = wrong, seed

    def __call__(self, text: Sequence[int], length: int) -> list[int]:
        grown = list(text)
        for _ in range(length):
            chance = random.Random(f"{self.seed}:{grown}").random()
            grown.append((target(grown) + (chance < self.wrong)) % VOCAB)
        return grown[len(text) :]


def play(draft: Draft, length: int, rounds: int, *, late: float = 0.0) -> tuple[Pearl, list[int]]:
    """Rounds of target step and draft; `late`: share of rounds in which a part is not ready."""
    machine, text = Pearl(length), [0]
    dice = random.Random(1)
    for _ in range(rounds):
        asked = machine.begin()
        proposal = draft([*text, *asked.prefix], asked.length)
        if dice.random() < late:
            proposal = proposal[: dice.randint(0, len(proposal))]
        emitted = walk(text, asked.prefix)
        machine.finish(emitted, asked, proposal)
        text += emitted
    return machine, text[1:]


def walk(text: Sequence[int], scheduled: Sequence[int]) -> list[int]:
    grown = list(text)
    for token in scheduled:
        own = target(grown)
        grown.append(own)
        if own != token:
            return grown[len(text) :]
    grown.append(target(grown))
    return grown[len(text) :]


def reference(draft: Draft, length: int, rounds: int) -> list[int]:
    """Tokens of each round, from the paper's two phases and without a machine.

    One uninterrupted draft runs ahead of the text; a round verifies what the draft had made when it
    began, plus one token of the target's own.
    """
    text, ahead, sizes = [0], 0, []
    for _ in range(rounds):
        made = draft(text, ahead + length + (ahead > 0))
        size = 0
        for token in made[: ahead + 1]:
            own = target(text)
            text.append(own)
            size += 1
            if own != token:
                ahead = 0
                break
        else:  # all right, and so was the guess of the target's own token
            ahead = len(made) - (ahead + 1)
        sizes.append(size)
    return sizes


def test_the_text_is_the_targets_whatever_is_proposed() -> None:
    for wrong in (0.0, 0.2, 0.6, 1.0):
        _, text = play(Draft(wrong), 4, 40, late=0.3)
        expected = [0]
        while len(expected) <= len(text):
            expected.append(target(expected))
        assert text == expected[1:]


@given(st.integers(1, 7), st.sampled_from([0.0, 0.05, 0.2, 0.5, 1.0]), st.integers(0, 99))
def test_rounds_are_those_of_the_paper(length: int, wrong: float, seed: int) -> None:
    draft, rounds = Draft(wrong, seed), 25
    machine, text = play(draft, length, rounds)
    expected = reference(draft, length, rounds)
    assert machine.tally.emitted == len(text) == sum(expected)
    # Round by round as well.
    again, at = Pearl(length), [0]
    sizes = []
    for _ in range(rounds):
        asked = again.begin()
        emitted = walk(at, asked.prefix)
        again.finish(emitted, asked, draft([*at, *asked.prefix], asked.length))
        at += emitted
        sizes.append(len(emitted))
    assert sizes == expected


def test_a_draft_that_is_always_right_never_leaves_post_verification() -> None:
    machine, text = play(Draft(0.0), 4, 50)
    # The first round verifies c_1 alone and schedules three; each later one yields g more.
    assert machine.phase is Phase.POST
    assert len(text) == 1 + 4 + 48 * 5
    assert machine.tally.longest == len(text)
    assert machine.tally.kept == machine.tally.proposed


def test_a_draft_that_is_always_wrong_costs_no_verification() -> None:
    machine = Pearl(4)
    text = [0]
    for _ in range(30):
        asked = machine.begin()
        assert asked.prefix == ()
        assert asked.length == 4
        emitted = walk(text, asked.prefix)
        machine.finish(emitted, asked, Draft(1.0)([*text, *asked.prefix], asked.length))
        text += emitted
        assert machine.phase is Phase.PRE
    assert machine.tally.emitted == 30
    assert machine.tally.kept == 0


def test_the_draft_length_adapts() -> None:
    easy, _ = play(Draft(0.02), 3, 200)
    hard, _ = play(Draft(0.5), 3, 200)
    assert easy.tally.longest > 4 * 3 > hard.tally.longest
    assert easy.tally.emitted / 200 > 2.0 > hard.tally.emitted / 200


def test_a_draft_that_is_not_ready_is_a_short_one() -> None:
    machine = Pearl(4)
    asked = machine.begin()
    machine.finish([1], asked, [])
    assert machine.phase is Phase.PRE
    asked = machine.begin()
    machine.finish([1], asked, [1])  # right, and nothing behind it
    assert machine.phase is Phase.PRE
    asked = machine.begin()
    machine.finish([1], asked, [1, 2])
    assert machine.scheduled == (2,)


def test_the_engine_may_verify_less_than_was_scheduled() -> None:
    machine = Pearl(4)
    asked = machine.begin()
    machine.finish([1], asked, [1, 2, 0, 1])
    asked = machine.begin(limit=1)
    assert asked.prefix == (2,)
    machine.finish([2, 0], asked, [0, 1, 1])
    assert machine.scheduled == (1, 1)
    asked = machine.begin(limit=0)
    assert (asked.prefix, asked.length) == ((), 4)


def test_abandoned_work_is_dropped() -> None:
    machine = Pearl(3)
    stale = machine.begin()
    machine.abandon()
    assert machine.phase is Phase.PRE
    machine.begin()
    machine.finish([1], stale, [1, 2, 2])  # proposals for another text
    assert machine.scheduled == ()


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="length=0"):
        Pearl(0)
    machine = Pearl(2)
    asked = machine.begin()
    with pytest.raises(RuntimeError, match="begin"):
        machine.begin()
    with pytest.raises(ValueError, match="emitted"):
        machine.finish([1, 2], asked, [])
    with pytest.raises(ValueError, match="emitted"):
        machine.finish([], asked, [])
    machine.finish([1], asked, [1, 2])
    with pytest.raises(RuntimeError, match="without begin"):
        machine.finish([1], asked, [])
    asked = machine.begin()
    with pytest.raises(ValueError, match=r"emitted \[0, 1\] after scheduling \[2\]"):
        machine.finish([0, 1], asked, [])


def test_chunk_length_is_the_speed_ratio() -> None:
    assert chunk_length(0.034, 0.010, 16) == 3
    assert chunk_length(0.034, 0.050, 16) == 1
    assert chunk_length(1.0, 0.001, 16) == 16
    for bad in ((0.0, 1.0, 1), (1.0, -1.0, 1), (1.0, 1.0, 0)):
        with pytest.raises(ValueError, match="chunk_length"):
            chunk_length(*bad)


def test_overlap_is_noticed_and_its_lack_too() -> None:
    overlap = Overlap()
    for _ in range(50):
        overlap.record(1.0, 1.0, 0.6)  # hidden
    assert overlap.beside
    for _ in range(50):
        overlap.record(1.6, 1.0, 0.6)  # one after the other
    assert not overlap.beside
    tries = 0
    for _ in range(2000):
        if overlap.beside:
            tries += 1
            overlap.record(1.6, 1.0, 0.6)
        else:
            overlap.skipped()
    assert 0 < tries < 20
    for _ in range(100_000):  # a core became free
        if overlap.beside:
            overlap.record(1.0, 1.0, 0.6)
        else:
            overlap.skipped()
    assert overlap.beside
    assert overlap.hidden > 0.9
    before = overlap.hidden
    overlap.record(float("nan"), 1.0, 1.0)
    overlap.record(1.0, 0.0, 1.0)
    assert overlap.hidden == before
