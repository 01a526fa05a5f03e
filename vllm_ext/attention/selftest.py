# SPDX-License-Identifier: Apache-2.0
"""Start-up self-test of CPU tree attention, on random keys and values.

A wrong cache layout or mask does not crash: it changes the text.  So before any request: (1) tree
attention of a chain must equal the stock kernel; (2) tree attention of a random tree must equal
dense attention with an explicit mask in float64; (3) where a compiled kernel moves accepted nodes
within the cache, it must hold what the stock writer would have written.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata

from proposers.tree import TokenTree
from vllm_ext.worker.step import STEP_ATTRIBUTE, AttentionStep, TreeRows

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}
_NODES = 12


def self_test(layer: Any, dtype: torch.dtype) -> str | None:
    """Test one attention layer on a scratch cache.

    Args:
        layer: vLLM ``Attention`` layer whose impl has its ``layout``.
        dtype: of queries, keys and values.

    Returns:
        What is wrong, or ``None``.
    """
    generator = torch.Generator().manual_seed(0)
    block_size = layer.kv_cache.shape[2]
    base = block_size + block_size // 2 + 3  # the tree crosses no, the context one block border
    for seed, tree in enumerate((_chain(), _random_tree(0), _random_tree(1))):
        case = _Case(layer, dtype, base + seed * (block_size // 4), tree, generator)
        ours = case.tree_attention()
        expected = case.stock() if tree.is_chain else case.dense()
        error = float((ours.double() - expected.double()).abs().max())
        if not math.isfinite(error) or error > _TOLERANCE[dtype]:
            name = "the stock kernel" if tree.is_chain else "dense masked attention"
            return f"self-test: tree attention differs from {name} by {error:.2g}"
        # A draft model computes the last nodes alone, the others being in the cache.
        last = float((case.tree_attention(_NODES // 2) - ours[_NODES // 2 :]).abs().max())
        if not math.isfinite(last) or last > _TOLERANCE[dtype]:
            return f"self-test: tree attention of the last rows alone is off by {last:.2g}"
        if layer.impl.kernel is not None and not case.moves():
            return "self-test: accepted nodes moved within the cache are not what was written"
    return None


def seconds_per_call(layer: Any, dtype: torch.dtype, context: int = 512, calls: int = 20) -> float:
    """Least time of tree attention in one layer, for a tree of 12 nodes.

    Args:
        layer: as in `self_test`.
        dtype: as in `self_test`.
        context: committed tokens.
        calls: to take the least of; the first, which may compile, does not count.
    """
    case = _Case(layer, dtype, context, _random_tree(0), torch.Generator().manual_seed(0))
    least = math.inf
    for call in range(calls + 1):
        begin = time.perf_counter()
        case.tree_attention()
        if call:
            least = min(least, time.perf_counter() - begin)
    return least


def _chain() -> TokenTree:
    return TokenTree.chain(list(range(_NODES)), [0.5] * _NODES)


def _random_tree(seed: int) -> TokenTree:
    rng = np.random.default_rng(seed)
    parents = tuple(int(rng.integers(-1, node)) for node in range(_NODES))
    return TokenTree(tuple(range(_NODES)), parents, (0.5,) * _NODES)


class _Case:
    """Random keys and values of one request, written into a scratch cache with shuffled blocks."""

    def __init__(
        self,
        layer: Any,
        dtype: torch.dtype,
        base: int,
        tree: TokenTree,
        generator: torch.Generator,
    ) -> None:
        impl, cache = layer.impl, layer.kv_cache
        self.layer, self.impl = layer, impl
        self.rows = TreeRows.build(0, 0, base, tree)
        total = base + self.rows.size
        block_size = cache.shape[2]
        blocks = -(-total // block_size)
        self.cache = torch.zeros((blocks + 1, *cache.shape[1:]), dtype=cache.dtype)
        self.table = 1 + torch.randperm(blocks, generator=generator)
        shape = (total, impl.num_kv_heads, impl.head_size)
        self.keys = torch.randn(shape, generator=generator).to(dtype)
        self.values = torch.randn(shape, generator=generator).to(dtype)
        # As in the engine, where queries, keys and values are parts of the same rows: a compiled
        # kernel is compiled anew for another sort of tensor, and must not be while it serves.
        self.query = (
            torch.randn((self.rows.size, 2, impl.num_heads, impl.head_size), generator=generator)
            .to(dtype)
            .select(1, 0)
        )
        position = torch.arange(total)
        self.slots = self.table[position // block_size] * block_size + position % block_size
        impl.do_kv_cache_update(layer, self.keys, self.values, self.cache, self.slots)

    def tree_attention(self, first: int = 0) -> torch.Tensor:
        """Ours, through the impl's own forward, of the rows from ``first`` on."""
        rows = replace(self.rows, first=first)
        step = AttentionStep([rows], torch.arange(rows.queries), only_trees=True)
        metadata = SimpleNamespace(block_table=self.table[None].to(torch.int32))
        setattr(metadata, STEP_ATTRIBUTE, step)
        query = self.query[first:]
        output = torch.full(query.shape, float("nan"), dtype=query.dtype)
        base = self.rows.base + first
        self.impl.forward(
            self.layer,
            query,
            self.keys[base:],
            self.values[base:],
            self.cache,
            metadata,
            output,
        )
        return output

    def moves(self) -> bool:
        """Whether a path's nodes, moved within the cache, are where the stock writer puts them."""
        base, path = self.rows.base, torch.arange(2, self.rows.size, 2)
        sources, targets = self.slots[base + path], self.slots[base + 1 : base + 1 + len(path)]
        moved, written = self.cache.clone(), self.cache.clone()
        self.impl.move(moved, sources.numpy(), targets.numpy())
        keys, values = self.keys[base + path], self.values[base + path]
        self.impl.do_kv_cache_update(self.layer, keys, values, written, targets)
        return torch.equal(moved, written)

    def stock(self) -> torch.Tensor:
        """The stock kernel, which takes the rows for a chain."""
        rows, total = self.rows.size, len(self.keys)
        starts = torch.tensor([0, rows], dtype=torch.int32)
        lengths = torch.tensor([total], dtype=torch.int32)
        metadata = CPUAttentionMetadata(
            num_actual_tokens=rows,
            max_query_len=rows,
            query_start_loc=starts,
            max_seq_len=total,
            seq_lens=lengths,
            block_table=self.table[None].to(torch.int32),
            slot_mapping=self.slots[self.rows.base :],
            scheduler_metadata=ops.cpu_attn_get_scheduler_metadata(
                num_reqs=1,
                num_heads=self.impl.num_heads,
                num_kv_heads=self.impl.num_kv_heads,
                head_dim=self.impl.head_size,
                seq_lens=lengths,
                dtype=self.query.dtype,
                query_start_loc=starts,
                causal=True,
                sliding_window_size=self.impl.sliding_window,
                isa=self.layer.isa,
                enable_kv_split=False,
                kv_cache_dtype=self.impl.kv_cache_dtype,
            ),
        )
        output = torch.empty(self.query.shape, dtype=self.query.dtype)
        base = self.rows.base
        CPUAttentionBackendImpl.forward(
            self.impl,
            self.layer,
            self.query,
            self.keys[base:],
            self.values[base:],
            self.cache,
            metadata,
            output,
        )
        return output

    def dense(self) -> torch.Tensor:
        """Masked attention over the plain keys and values, in float64."""
        rows, base, total = self.rows, self.rows.base, len(self.keys)
        group = self.impl.num_heads // self.impl.num_kv_heads
        keys = self.keys.double().repeat_interleave(group, dim=1)
        values = self.values.double().repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", self.query.double(), keys) * self.impl.scale
        position = torch.arange(total)
        seen = torch.ones((rows.size, total), dtype=torch.bool)
        seen[:, base + 1 :] = False
        for node, parent in enumerate(rows.tree.parents):  # not the mask under test: from the tree
            seen[node + 1] = seen[parent + 1]
            seen[node + 1, base + 1 + node] = True
            position[base + 1 + node] = position[base + 1 + parent] + 1
        if self.impl.sliding_window >= 0:
            seen &= position[base:, None] - position[None, :] < self.impl.sliding_window
        weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", weights, values)
