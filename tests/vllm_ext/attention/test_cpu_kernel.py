# SPDX-License-Identifier: Apache-2.0
"""The compiled tree attention against dense masked attention in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.vllm_ext.attention.cpu_case import CHANGES, Case, Floats
from vllm_ext.attention.cpu_kernel import TILE, attend
from vllm_ext.gemm import PAIRS


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


def run_in_bfloat16(case: Case) -> NDArray[np.uint16]:
    """As in the engine: queries are part of a wider matrix, results are rounded to nearest."""
    rows, heads, size = case.query.shape
    wide = np.zeros((rows, heads + 3, size), np.uint16)
    wide[:, :heads] = case.query.view(np.uint32) >> 16
    out = np.zeros(case.query.shape, np.uint16)
    attend(*(case.arguments() | {"query": wide[:, :heads]}).values(), out)
    return out


@pytest.mark.parametrize("name", CASES)
def test_queries_and_results_of_bfloat16(name: str) -> None:
    case = replace(CASES[name], bfloat16=True)
    out = run_in_bfloat16(case)
    rounded = (out.astype(np.uint32) << 16).view(np.float32)
    # Half a unit of the last of 8 binary digits, and the error of the sums before it.
    np.testing.assert_allclose(rounded, case.dense(), rtol=2.0**-8, atol=2e-6)
    exact = torch.from_numpy(run(case)).bfloat16().view(torch.uint16).numpy()
    differs = float(np.mean(out != exact))  # products of pairs are summed in another order
    assert differs <= (0.01 if PAIRS else 0.0)


@pytest.mark.skipif(not PAIRS, reason="the processor has no products of pairs of bfloat16")
def test_pairs_are_not_mistaken_for_each_other() -> None:
    """The control: a query whose dimensions changed places within their pairs is another one."""
    case = Case(base=200, nodes=9, bfloat16=True)
    right = run_in_bfloat16(case)
    case.query = case.query.reshape(*case.query.shape[:2], -1, 2)[..., ::-1].reshape(
        case.query.shape
    )
    assert np.mean(run_in_bfloat16(case) != right) > 0.9


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
