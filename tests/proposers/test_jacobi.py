# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from proposers import VerifiedRows
from proposers.jacobi import JacobiSource


def rows(*seen: tuple[int, int, dict[int, float]]) -> VerifiedRows:
    return VerifiedRows(
        np.array([(before, last) for before, last, _ in seen], np.int64),
        np.array([list(top) for _, _, top in seen], np.int64),
        np.array([list(top.values()) for _, _, top in seen], np.float32),
        np.zeros(len(seen), np.int64),
    )


def guess(source: JacobiSource) -> dict[int, float]:
    return source.candidates(source.root("r"))[1]


def test_guesses_what_would_have_followed_the_rejected_token() -> None:
    source = JacobiSource()
    source.start("r", [1, 2], greedy=True)
    assert guess(source) == {}
    # After 2 the drafts were 3 and 4; the target emitted 9.
    source.observe(
        rows((2, 3, {5: 0.6, 6: 0.01}), (2, 4, {7: 0.9, 8: 0.05}), (1, 2, {9: 1.0, 0: 0}))
    )
    source.extend("r", [9])
    assert guess(source) == pytest.approx({5: 0.6})  # of the best sibling, and likely ones only
    state = source.advance(source.root("r"), 5)
    assert source.candidates(state) == (0, {})


def test_an_accepted_token_is_no_guess() -> None:
    source = JacobiSource()
    source.start("r", [1, 2], greedy=True)
    # 3 was accepted; of its children 4 was rejected and 8 emitted.
    source.observe(rows((3, 4, {6: 0.9}), (1, 2, {3: 0.9}), (2, 3, {8: 0.9})))
    source.extend("r", [3, 8])
    assert guess(source) == pytest.approx({6: 0.9})
    source.observe(rows((3, 8, {1: 0.9})))
    source.extend("r", [1])
    assert guess(source) == {}
    source.extend("r", [])
    source.stop("r")
    source.stop("r")
