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
