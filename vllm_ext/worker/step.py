# SPDX-License-Identifier: Apache-2.0
"""The trees of one engine step, laid out as rows of the batch.

A request that verifies a tree of N nodes contributes 1 + N consecutive rows: the root (its last
committed token) and the nodes.  vLLM gives row i the position and the slot ``base + i``, as for a
chain.  For a branching tree the *position* becomes ``base + depth``; the *slot* stays, and accepted
nodes are written to their final slots after the walk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from proposers.tree import TokenTree

STEP_ATTRIBUTE = "vllm_ext_step"
"""Attribute of vLLM's attention metadata that holds the :class:`AttentionStep`."""


@dataclass(slots=True)
class TreeRows:
    """One request's branching tree in the batch.

    Attributes:
        request: index of the request in the batch.
        start: row of the root.
        base: position of the root, which is also the number of tokens before it.
        tree: the nodes, in row order.
        visible: bool [1 + N, 1 + N]; row i sees row j of the same tree (ancestors, root, itself).
        depths: int64 [1 + N]; 0 for the root.
        first: rows before it are in the cache already and not in the batch, whose row ``start`` is
            the tree's row ``first``.
    """

    request: int
    start: int
    base: int
    tree: TokenTree
    visible: NDArray[np.bool_]
    depths: NDArray[np.int64]
    first: int = 0

    @classmethod
    def build(cls, request: int, start: int, base: int, tree: TokenTree) -> TreeRows:
        """Lay out ``tree`` at ``start``."""
        size = len(tree.tokens) + 1
        visible = np.zeros((size, size), dtype=np.bool_)
        visible[:, 0] = True
        visible[1:, 1:] = tree.ancestors()
        depths = np.zeros(size, dtype=np.int64)
        depths[1:] = tree.depths
        return cls(request, start, base, tree, visible, depths)

    @property
    def size(self) -> int:
        """Rows of this request: the root and its nodes."""
        return len(self.depths)

    @property
    def queries(self) -> int:
        """Rows of this request in the batch."""
        return len(self.depths) - self.first


@dataclass(slots=True)
class AttentionStep:
    """What the attention layers need for one step; attached to the step's attention metadata.

    Attributes:
        trees: the branching trees, in batch order.
        rows: int64 [R]; the batch rows of all branching trees, in order.
        only_trees: whether every row of the batch belongs to a branching tree.
        masks: additive masks, cached per (request, padded context, window) for the step's layers.
        placed: arguments of compiled kernels, cached per (request, id of the layers' metadata).
        keep: whether the layers fill the stash.
        stash: per layer name, the keys and values [R, kv_heads, head_size] of ``rows``, or ``None``
            for a layer that can `move` them within the cache.
    """

    trees: list[TreeRows]
    rows: torch.Tensor
    only_trees: bool
    keep: bool = True
    masks: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)
    placed: dict[tuple[int, int], tuple[Any, ...]] = field(default_factory=dict)
    stash: dict[str, tuple[torch.Tensor, torch.Tensor] | None] = field(default_factory=dict)


@dataclass(slots=True)
class Step:
    """All drafts of one step.

    Attributes:
        trees: per request of the batch, the tree that was scheduled (possibly empty).
        starts: per request, the first of its rows in the *logits* (root, then nodes).
        attention: the branching trees, or ``None`` if the stock kernels can do it all.
        strangers: drafts that were no prefix of a proposed tree and were read as chains.
        plain: whether nothing was drafted.
    """

    trees: list[TokenTree]
    starts: list[int]
    attention: AttentionStep | None
    strangers: int
    plain: bool = field(init=False)

    def __post_init__(self) -> None:
        self.plain = not any(self.trees)


def scheduled_tree(proposed: TokenTree | None, scheduled: Sequence[int]) -> TokenTree | None:
    """The tree that the scheduler kept: a prefix of what was proposed, or ``None``.

    The scheduler truncates drafts (token budget, ``max_model_len``, grammar); nodes are in an order
    in which every prefix is a tree.
    """
    size = len(scheduled)
    if proposed is None or list(proposed.tokens[:size]) != list(scheduled):
        return None
    return proposed.prefix(size)


def build_step(
    request_ids: Sequence[str],
    scheduled: Mapping[str, Sequence[int]],
    proposed: Mapping[str, TokenTree],
    query_starts: NDArray[np.int32],
    bases: NDArray[np.int32],
) -> Step:
    """Match the scheduled drafts with the proposed trees.

    Args:
        request_ids: the batch, in order.
        scheduled: draft tokens per request id, as the scheduler sent them.
        proposed: the trees we proposed in the last step.
        query_starts: int32 [requests + 1]; first row of each request.
        bases: int32 [requests]; position of each request's first row.
    """
    if not scheduled:
        count = len(request_ids)
        return Step([TokenTree.EMPTY] * count, list(range(count)), None, 0)
    trees: list[TokenTree] = []
    starts: list[int] = []
    branching: list[TreeRows] = []
    next_start = strangers = 0
    for index, request_id in enumerate(request_ids):
        tokens = scheduled.get(request_id, ())
        tree = scheduled_tree(proposed.get(request_id), tokens) if tokens else TokenTree.EMPTY
        if tree is None:
            # Not ours.  Without a tree the rows mean a chain to vLLM, and a chain is always exact.
            tree = TokenTree.chain(tokens, [0.0] * len(tokens))
            strangers += 1
        trees.append(tree)
        starts.append(next_start)
        next_start += 1 + len(tree.tokens)
        if not tree.is_chain:
            first = int(query_starts[index])
            branching.append(TreeRows.build(index, first, int(bases[index]), tree))
    if not branching:
        return Step(trees, starts, None, strangers)
    rows = np.concatenate([np.arange(t.start, t.start + t.size) for t in branching])
    only_trees = len(rows) == int(query_starts[len(request_ids)])
    attention = AttentionStep(branching, torch.from_numpy(rows), only_trees)
    return Step(trees, starts, attention, strangers)
