# SPDX-License-Identifier: Apache-2.0
"""How many nodes a step has room for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.worker.drafting import batch_limit


@given(st.integers(1, 10_000), st.integers(0, 500))
def test_prompts_keep_half_of_what_decoding_leaves(budget: int, decoding: int) -> None:
    nodes = batch_limit(budget, decoding)
    left = budget - decoding
    assert 0 <= nodes <= max(0, left)
    assert left - nodes >= max(0, left) / 2 or left < 0
    assert nodes >= (left - 1) / 2 or left < 0  # and no more than half


def test_a_full_batch_has_no_nodes() -> None:
    assert batch_limit(96, 8) == 44
    assert batch_limit(96, 96) == batch_limit(96, 200) == 0
