# SPDX-License-Identifier: Apache-2.0
"""Which blocks hold the draft model's keys: a mark must never outlive what it says."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_ext.worker.draft_ledger import DraftLedger

TEXT = np.arange(20, dtype=np.int32)
BLOCKS = np.array([7, 3, 9, 4, 1], dtype=np.int32)  # of four slots


@pytest.fixture
def ledger() -> DraftLedger:
    made = DraftLedger(4)
    made.wrote(TEXT, BLOCKS, 0, 14)
    return made


def test_full_blocks_are_valid(ledger: DraftLedger) -> None:
    assert ledger.valid(TEXT, BLOCKS) == 12
    assert ledger.valid(TEXT[:9], BLOCKS) == 8
    ledger.wrote(TEXT, BLOCKS, 14, 17)
    assert ledger.valid(TEXT, BLOCKS) == 16


def test_a_block_that_was_never_written_is_not(ledger: DraftLedger) -> None:
    assert ledger.valid(TEXT, np.array([7, 2, 9], dtype=np.int32)) == 4
    assert DraftLedger(4).valid(TEXT, BLOCKS) == 0


def test_the_whole_text_before_a_block_counts(ledger: DraftLedger) -> None:
    other = TEXT.copy()
    other[0] = 99
    assert ledger.valid(other, BLOCKS) == 0
    assert ledger.valid(TEXT[4:], BLOCKS[1:]) == 0  # the same tokens at other positions


def test_blocks_are_not_taken_for_each_other(ledger: DraftLedger) -> None:
    assert ledger.valid(TEXT, np.array([3, 7, 9], dtype=np.int32)) == 0


@pytest.mark.parametrize(("start", "end", "left"), [(14, 16, 12), (11, 12, 8), (0, 1, 0)])
def test_scribbles_unmark_what_they_touch(
    ledger: DraftLedger, start: int, end: int, left: int
) -> None:
    ledger.scribbled(BLOCKS, start, end)
    assert ledger.valid(TEXT, BLOCKS) == left


def test_another_text_takes_a_block_over(ledger: DraftLedger) -> None:
    other = TEXT + 50
    ledger.wrote(other, np.array([9, 8], dtype=np.int32), 0, 8)
    assert ledger.valid(TEXT, BLOCKS) == 8
    assert ledger.valid(other, np.array([9, 8], dtype=np.int32)) == 8


def test_forgotten_blocks_are_not_valid(ledger: DraftLedger) -> None:
    ledger.forget([3, 100])
    assert ledger.valid(TEXT, BLOCKS) == 4


def test_blocks_have_slots() -> None:
    with pytest.raises(ValueError, match="block_size=0"):
        DraftLedger(0)
