# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import EOS, TINY, SetConstraint

from logits_processors.bitmask import unpack
from logits_processors.bounded import BoundedConstraint
from logits_processors.xgrammar_constraint import compile_xgrammar

DIGITS = compile_xgrammar("ebnf", "root ::= [01]+", TINY)


def bounded(max_tokens: int) -> BoundedConstraint:
    return BoundedConstraint(DIGITS.start(), TINY, max_tokens)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(max_tokens=st.integers(1, 5), moves=st.lists(st.integers(-2, 4), max_size=20))
def test_three_ways_to_ask_agree(max_tokens: int, moves: list[int]) -> None:
    constraint = bounded(max_tokens)
    text: list[int] = []
    for move in moves:
        if move < 0:
            count = min(-move, len(text))
            constraint.rollback(count)
            del text[len(text) - count :]
        else:
            allowed = constraint.allows(move)
            assert constraint.accept(move) is allowed
            text += [move] * allowed
        if text and text[-1] == EOS:
            assert len(text) <= max_tokens
        assert constraint.num_accepted == len(text)
        assert len(text) < max_tokens or text[-1] == EOS
        asked = [constraint.allows(token) for token in range(TINY.size)]
        assert unpack(constraint.full_mask(), TINY.size).tolist() == asked
        mask = constraint.mask()
        assert mask is not None
        assert np.array_equal(mask, constraint.full_mask())


def test_the_last_token_is_the_end_or_nothing() -> None:
    constraint = bounded(3)
    assert constraint.accept(0)
    assert constraint.accept(1)
    assert not constraint.allows(0)
    assert not constraint.accept(0)
    fork = constraint.fork()
    assert fork.accept(EOS)
    assert fork.complete()
    assert constraint.num_accepted == 2
    constraint.reset()
    assert constraint.num_accepted == 0
    assert constraint.allows(0)
    assert not bounded(1).full_mask().any()  # the empty text is no member


def test_no_cheap_mask_becomes_none_out_of_thin_air() -> None:
    constraint = BoundedConstraint(SetConstraint([0, EOS], TINY.size), TINY, 2)
    assert constraint.mask() is None
    assert constraint.accept(0)
    assert constraint.mask() is not None


def test_no_room_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens=0"):
        bounded(0)
