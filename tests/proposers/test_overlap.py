# SPDX-License-Identifier: Apache-2.0
"""The speed ratio, and noticing that nothing is hidden."""

from __future__ import annotations

import pytest

from proposers.overlap import Overlap, chunk_length


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


@pytest.mark.parametrize(
    ("hit_every", "accepted", "together", "pays"),
    [
        (1, 4, 1.0, True),  # always right and hidden
        (1, 4, 1.3, True),  # half hidden
        (4, 4, 1.0, False),  # 2 tokens in 1.0 beside against 5 in 1.6
        (4, 0, 1.0, True),  # nothing to lose: (1 + 0) / 1.0 against (1 + 0) / 1.6
        (2, 1, 1.0, True),  # 1.5 in 1.0 against 2 in 1.6
        (2, 1, 1.3, False),  # 1.5 in 1.3
    ],
)
def test_hidden_drafting_pays_where_it_is_right_often_enough(
    hit_every: int, accepted: int, together: float, pays: bool
) -> None:
    overlap = Overlap()
    assert overlap.pays
    for step in range(400):
        overlap.record(together, 1.0, 0.6)
        overlap.judged(step % hit_every == 0)
        overlap.verified(accepted)
    assert overlap.hits == pytest.approx(1.0 / hit_every, abs=0.05)
    assert overlap.accepted == pytest.approx(accepted, abs=0.01)
    assert overlap.pays is pays
    assert overlap.beside is pays


def test_a_few_steps_are_enough_to_see_that_drafts_are_wrong() -> None:
    overlap = Overlap()
    for _ in range(12):
        overlap.record(1.2, 1.0, 0.6)
        overlap.judged(False)
        overlap.verified(1)
    assert not overlap.beside
