# SPDX-License-Identifier: Apache-2.0
"""The compiled tree attention against dense masked attention in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.vllm_ext.attention.cpu_case import CHANGES, Case, Floats
from vllm_ext.attention.cpu_kernel import TILE, attend


def run(case: Case, **changed: Any) -> Floats:
    """The kernel, on a request or with something changed."""
    out = np.full(case.query.shape, np.nan, np.float32)
    arguments = case.arguments() | changed
    arguments["query"] = arguments["query"].view(np.uint32)
    attend(*arguments.values(), out.view(np.uint32))
    return out


CASES = {
    "small": Case(base=5, nodes=3),
    "no context": Case(base=0, nodes=7),
    "one row": Case(base=40, nodes=0),
    "tile border": Case(base=TILE - 2, nodes=6),
    "long": Case(base=700, nodes=24, block_size=128),
    "many nodes": Case(base=130, nodes=127),
    "blocks apart": Case(base=300, nodes=9, gap=3),
    "short blocks": Case(base=100, nodes=9, block_size=16),
    "no groups": Case(base=70, nodes=5, heads=3, kv_heads=3),
    "one key head": Case(base=70, nodes=5, heads=5, kv_heads=1),
    "narrow head": Case(base=70, nodes=5, size=32),
    "head of 80": Case(base=70, nodes=5, size=80),
    "head of 128": Case(base=70, nodes=5, size=128),
    "head of 256": Case(base=70, nodes=5, size=256),
    "window": Case(base=300, nodes=9, window=50),
    "narrow window": Case(base=300, nodes=12, window=2),
    "last rows": Case(base=90, nodes=9, first=6),
    "last rows, window": Case(base=290, nodes=9, first=6, window=20),
    "bfloat16": Case(base=200, nodes=9, bfloat16=True),
    "bfloat16, window": Case(base=200, nodes=9, bfloat16=True, window=70, block_size=128),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_dense_attention(name: str) -> None:
    case = CASES[name]
    np.testing.assert_allclose(run(case), case.dense(), atol=2e-6)


@pytest.mark.parametrize("seed", range(20))
def test_equals_dense_attention_on_random_sizes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    case = Case(
        base=int(rng.integers(0, 400)),
        nodes=int(rng.integers(0, 40)),
        window=int(rng.integers(1, 300)) if seed % 2 else -1,
        seed=seed,
    )
    np.testing.assert_allclose(run(case), case.dense(), atol=2e-6)


def test_queries_and_results_of_bfloat16() -> None:
    """The engine's: part of a wider matrix, rounded to nearest."""
    case = Case(base=200, nodes=9, bfloat16=True)
    rows, heads, size = case.query.shape
    wide = np.zeros((rows, heads + 3, size), np.uint16)
    wide[:, :heads] = case.query.view(np.uint32) >> 16
    out = np.zeros(case.query.shape, np.uint16)
    attend(*(case.arguments() | {"query": wide[:, :heads]}).values(), out)
    exact = torch.from_numpy(run(case)).bfloat16().view(torch.uint16).numpy()
    np.testing.assert_array_equal(out, exact)


@pytest.mark.parametrize("nodes", [0, 1, 2, 3])
def test_slots_that_were_never_written_may_hold_anything(nodes: int) -> None:
    case = Case(base=70, nodes=nodes, unwritten=np.nan)
    np.testing.assert_allclose(run(case), case.dense(), atol=2e-6)


def test_large_scores_do_not_overflow() -> None:
    case = Case(base=100, nodes=4)
    case.query *= 1000.0
    np.testing.assert_allclose(run(case), case.dense(), atol=2e-4)


@pytest.mark.parametrize(("changed", "value"), CHANGES)
def test_every_argument_matters(changed: str, value: Any) -> None:
    case = Case(base=300, nodes=12, window=2, first=1)
    np.testing.assert_allclose(run(case), case.dense(), atol=2e-6)
    assert np.abs(run(case, **{changed: value}) - case.dense()).max() > 1e-2
