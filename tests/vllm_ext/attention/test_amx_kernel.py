# SPDX-License-Identifier: Apache-2.0
"""Tree attention by matrix tiles against dense masked attention in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.vllm_ext.attention.cpu_case import CHANGES, Case, Floats
from vllm_ext import amx

if not amx.supported():
    pytest.skip("this processor has no AMX", allow_module_level=True)

from vllm_ext.attention.amx_kernel import TILE, attend

BFLOAT16 = 2.0**-8
"""Largest relative error of a rounded number: here of the softmax weights and of the result."""


def case(base: int, nodes: int, **changed: Any) -> Case:
    """A request whose cache is packed for tiles."""
    return Case(base, nodes, bfloat16=True, paired=True, **changed)


def run(case: Case, **changed: Any) -> Floats:
    """The kernel, on a request or with something changed."""
    arguments = case.arguments() | changed
    arguments["query"] = (arguments["query"].view(np.uint32) >> 16).astype(np.uint16)
    out = np.full(case.query.shape, 0x7FC0, np.uint16)  # NaN
    attend(amx.CONFIGURATION, *arguments.values(), out)
    return (out.astype(np.uint32) << 16).view(np.float32)


def assert_close(found: Floats, case: Case) -> None:
    """Within what rounding can do: a weighted mean of values, each weight off by its rounding."""
    np.testing.assert_allclose(found, case.dense(), atol=BFLOAT16 * np.abs(case.values).max())
    assert np.abs(found - case.dense()).mean() < BFLOAT16 / 2


CASES = {
    "small": case(5, 3),
    "no context": case(0, 7),
    "one row": case(40, 0),
    "tile border": case(TILE - 2, 6),
    "long": case(700, 24, block_size=128),
    "many nodes": case(130, 127),
    "window": case(300, 9, window=50, block_size=96),
    "narrow window": case(300, 12, window=2),
    "last rows": case(90, 9, first=6),
    "last rows, window": case(290, 9, first=6, window=20),
    "blocks apart": case(300, 9, gap=3),
    "no groups": case(70, 5, heads=3, kv_heads=3),
    "one key head": case(70, 5, heads=5, kv_heads=1),
    "narrow head": case(70, 5, size=32),
    "head of 96": case(70, 5, size=96),
    "head of 128": case(70, 5, size=128),
    "head of 256": case(70, 5, size=256),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_dense_attention(name: str) -> None:
    assert_close(run(CASES[name]), CASES[name])


@pytest.mark.parametrize("seed", range(20))
def test_equals_dense_attention_on_random_sizes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    request = case(
        int(rng.integers(0, 400)),
        int(rng.integers(0, 40)),
        window=int(rng.integers(1, 300)) if seed % 2 else -1,
        seed=seed,
    )
    assert_close(run(request), request)


@pytest.mark.parametrize("nodes", range(36))
def test_slots_that_were_never_written_may_hold_anything(nodes: int) -> None:
    request = case(70, nodes, unwritten=np.nan)
    assert_close(run(request), request)


def test_large_scores_do_not_overflow() -> None:
    request = case(100, 4)
    request.query *= 1024.0
    found = run(request)
    assert np.isfinite(found).all()
    assert np.median(np.abs(found - request.dense())) < 1e-2


@pytest.mark.parametrize(("changed", "value"), CHANGES)
def test_every_argument_matters(changed: str, value: Any) -> None:
    request = case(300, 12, window=2, first=1)
    assert_close(run(request), request)
    with pytest.raises(AssertionError):
        assert_close(run(request, **{changed: value}), request)
