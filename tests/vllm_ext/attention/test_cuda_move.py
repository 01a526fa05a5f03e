# SPDX-License-Identifier: Apache-2.0
"""KV commit on a GPU, layer by layer and all at once: interpreted, or on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from proposers.tree import TokenTree
from tests.vllm_ext.attention.gpu_layer import DEVICE, HEAD, KV_HEADS, PAGE, make_layer
from vllm_ext.worker.commit import commit
from vllm_ext.worker.step import AttentionStep, TreeRows

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

TREE = TokenTree(tuple(range(8)), (-1, -1, 0, 1, 2, 3, 3, 6), (0.5,) * 8)
SMALL = TokenTree((1, 2, 3), (-1, -1, 1), (0.5,) * 3)
PATHS = [[1, 3, 6, 7], [], [1, 2]]  # of the batch; the second request has no tree
ROWS = 9 + 1 + 4
BLOCKS = 8


def step() -> AttentionStep:
    trees = [TreeRows.build(0, 0, 20, TREE), TreeRows.build(2, 10, 20, SMALL)]
    rows = torch.tensor([*range(9), *range(10, 14)], device=DEVICE)
    return AttentionStep(trees, rows, only_trees=False)


def filled(names: list[str], seed: int = 0) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Layers with random caches, and the slots of the batch's rows."""
    chance = torch.Generator().manual_seed(seed)
    layers = {name: make_layer(blocks=BLOCKS) for name in names}
    for layer in layers.values():
        layer.kv_cache.copy_(torch.randn(layer.kv_cache.shape, generator=chance))
    slots = torch.randperm(BLOCKS, generator=chance)[:4].repeat_interleave(4) * PAGE
    slots = (slots + torch.arange(16) % 16)[:ROWS]
    return layers, dict.fromkeys(names, slots.to(DEVICE))


def written(layers: dict[str, Any], mappings: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The caches that the other way of committing leaves, from rows kept in a stash."""
    made = step()
    before = {name: layer.kv_cache.clone() for name, layer in layers.items()}
    for name, layer in layers.items():
        slots = mappings[name][made.rows]
        stored = layer.kv_cache[slots // PAGE, :, slots % PAGE]
        made.stash[name] = stored[..., :HEAD].clone(), stored[..., HEAD:].clone()
        assert made.stash[name][0].shape == (13, KV_HEADS, HEAD)
    commit(made, PATHS, layers, mappings)
    after = {name: layer.kv_cache.clone() for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.kv_cache.copy_(before[name])
    return after


def test_both_ways_give_the_same_caches() -> None:
    from vllm_ext.attention.cuda_move import CacheMover

    layers, mappings = filled(["a", "b", "c"])
    wanted = written(layers, mappings)
    assert not torch.equal(wanted["b"], layers["b"].kv_cache)
    mover = CacheMover([["a", "b"], ["c"]], layers)
    mover.commit(step(), PATHS, mappings)
    assert all(torch.equal(layers[name].kv_cache, wanted[name]) for name in layers)


def test_caches_of_two_shapes_and_one_that_is_shared() -> None:
    from vllm_ext.attention.cuda_move import CacheMover

    layers, mappings = filled(["a", "b", "c"])
    layers["b"].kv_cache = torch.randn(2 * BLOCKS, KV_HEADS, PAGE, 2 * HEAD).to(DEVICE)[::2]
    wanted = written(layers, mappings)
    layers["c"].kv_cache = layers["a"].kv_cache  # which would be moved twice
    layers["c"].impl.kv_sharing_target_layer_name = "a"
    mover = CacheMover([["a", "b", "c"]], layers)
    mover.commit(step(), PATHS, mappings)
    assert all(torch.equal(layers[name].kv_cache, wanted[name]) for name in ("a", "b"))


def test_nothing_moves_where_nothing_has_to(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ext.attention import cuda_move

    layers, mappings = filled(["a"])
    mover = cuda_move.CacheMover([["a"]], layers)
    monkeypatch.setattr(cuda_move, "move_paths", None)  # a launch would raise
    mover.commit(step(), [[0, 1], [], [0]], mappings)


def test_caches_that_are_allocated_anew_are_found() -> None:
    from vllm_ext.attention.cuda_move import CacheMover

    layers, mappings = filled(["a"])
    mover = CacheMover([["a"]], layers)
    mover.commit(step(), PATHS, mappings)
    layers["a"].kv_cache = torch.randn_like(layers["a"].kv_cache)
    wanted = written(layers, mappings)
    mover.commit(step(), PATHS, mappings)
    assert torch.equal(layers["a"].kv_cache, wanted["a"])


def test_the_self_test_passes_and_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ext.attention import cuda_move

    layers, _ = filled(["a", "b"])
    before = layers["a"].kv_cache.clone()
    assert cuda_move.make_mover([["a", "b"]], layers) is not None
    assert torch.equal(layers["a"].kv_cache, before)  # tried on scratch caches
    real = cuda_move.move_paths

    def backwards(caches: Any, slots: Any, moves: Any, starts: Any) -> None:
        real(caches, slots, moves.flip(1).contiguous(), starts)

    def fails(*args: Any) -> None:
        raise RuntimeError("no such instruction")

    for broken in (backwards, fails):
        monkeypatch.setattr(cuda_move, "move_paths", broken)
        assert cuda_move.make_mover([["a", "b"]], layers) is None


@pytest.mark.parametrize("page", [1, 8, 64])
def test_the_self_test_stays_within_its_scratch_caches(page: int) -> None:
    """Whatever the size of a page; what lies outside may be another's."""
    from vllm_ext.attention import cuda_move

    layer = make_layer(blocks=2)
    layer.kv_cache = torch.zeros(2, KV_HEADS, page, 2 * HEAD, device=DEVICE)
    keys, _ = cuda_move._scratch(layer, 0)
    slots, *_ = cuda_move._trial(keys.device)
    assert int(slots.max()) < keys.shape[0] * page
    assert cuda_move.make_mover([["a"]], {"a": layer}) is not None
