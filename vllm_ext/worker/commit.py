# SPDX-License-Identifier: Apache-2.0
"""KV commit: write the accepted nodes' keys and values to the slots of their final positions.

The attention layers stash the keys and values of tree rows; after the walk the accepted ones are
written by the backend's own writer.  So nothing here knows the layout, dtype or quantisation of the
cache, and no source can be overwritten before it is read.  A layer whose cache was probed moves
them within it instead, which spares the stash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_ext.worker.step import AttentionStep


def displaced(step: AttentionStep, paths: Sequence[Sequence[int]]) -> list[list[tuple[int, int]]]:
    """Per branching tree, the accepted rows that are not where they belong.

    Args:
        step: the step's branching trees.
        paths: per request of the batch, its accepted nodes in order.

    Returns:
        Which of the tree's rows goes to the slot of which other, in the order of the path: the j-th
        accepted node (from 1) belongs to the slot of row j.
    """
    return [
        [
            (node + 1, depth)
            for depth, node in enumerate(paths[tree.request], start=1)
            if node + 1 != depth
        ]
        for tree in step.trees
    ]


def accepted_moves(
    step: AttentionStep, paths: Sequence[Sequence[int]]
) -> tuple[list[int], list[int]]:
    """Which stashed rows go where.

    Args:
        step: as for `displaced`.
        paths: likewise.

    Returns:
        Indices into the stash, and for each the batch row whose slot it must fill.
    """
    sources: list[int] = []
    rows: list[int] = []
    offset = 0
    for tree, moves in zip(step.trees, displaced(step, paths), strict=True):
        sources += [offset + row for row, _ in moves]
        rows += [tree.start + depth for _, depth in moves]
        offset += tree.size
    return sources, rows


def commit(
    step: AttentionStep,
    paths: Sequence[Sequence[int]],
    layers: Mapping[str, Any],
    slot_mappings: Mapping[str, torch.Tensor],
) -> None:
    """Write accepted nodes of all layers.

    Args:
        step: the step, with the stash that its layers filled.
        paths: per request of the batch, its accepted nodes in order.
        layers: attention layers by name (``static_forward_context``).
        slot_mappings: slots [rows] by layer name.
    """
    sources, rows = accepted_moves(step, paths)
    if not sources:
        return
    # Moved once: an index on the host would be copied to the GPU again by every layer.
    device = next(iter(slot_mappings.values())).device
    source, row = torch.tensor([sources, rows], dtype=torch.int64).to(device)
    slots_of: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # one mapping per KV group
    for name, stashed in step.stash.items():
        layer = layers[name]
        mapping = slot_mappings[name]
        if id(mapping) not in slots_of:
            slots_of[id(mapping)] = mapping[step.rows[source]], mapping[row]
        of, to = slots_of[id(mapping)]
        if stashed is None:
            layer.impl.move(layer.kv_cache, of.numpy(), to.numpy())
        else:
            key, value = (tensor[source] for tensor in stashed)
            layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, to)
