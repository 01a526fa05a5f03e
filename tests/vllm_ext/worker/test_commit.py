# SPDX-License-Identifier: Apache-2.0
"""Accepted nodes end in the slots of their positions: written by the backend or moved."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from proposers.tree import TokenTree
from tests.vllm_ext.attention.cpu_layer import make_layer
from vllm_ext.attention.layout import probe
from vllm_ext.attention.selftest import _Case
from vllm_ext.worker.commit import commit
from vllm_ext.worker.step import STEP_ATTRIBUTE, AttentionStep

# Path 1, 3, 6, 7: all but the last move, the second to where the first of another path lies.
TREE = TokenTree(tuple(range(8)), (-1, -1, 0, 1, 2, 3, 3, 6), (0.5,) * 8)
PATH = [1, 3, 6, 7]
BASE = 29  # the tree crosses a border of blocks


def committed(dtype: torch.dtype, path: list[int], *, compiled: bool) -> torch.Tensor:
    """The cache after a step that accepts `path`."""
    layer = make_layer(dtype, 32)
    layer.impl.layout = probe(layer, layer.kv_cache)
    if compiled:
        pytest.importorskip("numba")
        layer.impl.kernel = lambda *args: None  # what it would write is not looked at
    case = _Case(layer, dtype, BASE, TREE, torch.Generator().manual_seed(0))
    layer.kv_cache = case.cache
    step = AttentionStep([case.rows], torch.arange(case.rows.size), only_trees=True)
    metadata: Any = SimpleNamespace(block_table=case.table[None].to(torch.int32))
    setattr(metadata, STEP_ATTRIBUTE, step)
    keys, values = case.keys[BASE:], case.values[BASE:]
    layer.impl.forward(layer, case.query, keys, values, case.cache, metadata, case.query.clone())
    assert (step.stash["layer"] is None) == compiled
    commit(step, [path], {"layer": layer}, {"layer": case.slots[BASE:]})
    expected = case.cache.clone()
    order = [0, *(node + 1 for node in path)]  # the root stays, nodes follow by depth
    layer.impl.do_kv_cache_update(
        layer, keys[order], values[order], expected, case.slots[BASE : BASE + len(order)]
    )
    assert torch.equal(case.cache, expected)
    return case.cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", [PATH, PATH[:2], [0, 2, 4], [0], []], ids=str)
def test_both_ways_give_the_same_cache(dtype: torch.dtype, path: list[int]) -> None:
    stashed = committed(dtype, path, compiled=False)
    assert torch.equal(stashed, committed(dtype, path, compiled=True))


def test_a_path_in_another_order_overwrites_what_is_still_to_be_read() -> None:
    """The control: the order of the path is what makes moving safe."""
    layer = make_layer(torch.float32, 32)
    layer.impl.layout = probe(layer, layer.kv_cache)
    pytest.importorskip("numba")
    case = _Case(layer, torch.float32, BASE, TREE, torch.Generator().manual_seed(0))
    sources, targets = case.slots[BASE + 2 : BASE + 5].numpy(), case.slots[BASE + 1 :].numpy()[:3]
    right, wrong = case.cache.clone(), case.cache.clone()
    layer.impl.move(right, sources, targets)
    layer.impl.move(wrong, sources[::-1].copy(), targets[::-1].copy())
    assert not torch.equal(right, wrong)
