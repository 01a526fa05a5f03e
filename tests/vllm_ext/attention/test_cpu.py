# SPDX-License-Identifier: Apache-2.0
"""What the layers of a step share, and what they must not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.vllm_ext.attention.cpu_layer import make_layer
from vllm_ext.attention import cpu, setup
from vllm_ext.attention.selftest import _Case, _random_tree
from vllm_ext.worker.step import STEP_ATTRIBUTE, AttentionStep


def attention(case: _Case, step: AttentionStep, metadata: Any) -> torch.Tensor:
    out = torch.full_like(case.query, float("nan"))
    base = case.rows.base
    case.impl.forward(
        case.layer, case.query, case.keys[base:], case.values[base:], case.cache, metadata, out
    )
    assert step.placed
    return out


def test_each_group_of_layers_has_its_own_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step, one tree, two groups whose blocks and caches differ, in turns."""
    monkeypatch.setattr(setup, "seconds_per_call", lambda *args, times=[2.0, 1.0]: times.pop(0))
    layer = make_layer(torch.float32, 32)
    assert setup._set_up_layer(layer, {}) is None
    assert layer.impl.kernel is not None
    generator = torch.Generator().manual_seed(0)
    groups = [_Case(layer, torch.float32, 150, _random_tree(0), generator) for _ in range(2)]
    assert not torch.equal(groups[0].table, groups[1].table)
    step = AttentionStep([groups[0].rows], torch.arange(groups[0].rows.size), only_trees=True)
    metadata = [SimpleNamespace(block_table=case.table[None].to(torch.int32)) for case in groups]
    placed: list[int] = []
    place = cpu.place
    monkeypatch.setattr(cpu, "place", lambda *args: placed.append(1) or place(*args))
    for _ in range(2):
        for case, mine in zip(groups, metadata, strict=True):
            setattr(mine, STEP_ATTRIBUTE, step)
            found = attention(case, step, mine).double()
            torch.testing.assert_close(found, case.dense(), atol=2e-6, rtol=0)
    assert len(placed) == 2  # once per group, not per layer
