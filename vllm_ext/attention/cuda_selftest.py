# SPDX-License-Identifier: Apache-2.0
"""Start-up self-test of CUDA tree attention, on random keys and values in a scratch cache.

As on the CPU: (1) tree attention of a chain must equal the stock kernel, which reads the cache that
the stock writer filled; (2) tree attention of a random tree must equal dense attention with an
explicit mask in float64.  A wrong cache layout, mask or scale fails here, not in the text.  The
trees are of sizes that need every launch shape, so that none is compiled while requests wait.
"""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from proposers.tree import TokenTree
from vllm_ext.attention.tree_launch import LAUNCH_ATTRIBUTE, DeviceStep, TreeLaunch, window_of
from vllm_ext.worker.step import AttentionStep, Step, TreeRows

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}
_TOLERANCE_FLOAT8 = 0.1
_CHAIN_NODES = 12
_STACKED_ROWS = (16, 32, 64, 128)  # rows times heads of a group that the launch shapes differ by
_BASES = (37, 300)  # one piece, and several
_MANY_PROCESSORS = 1 << 16  # so that the longer contexts are split


def self_test(layer: Any, builder: Any, runner: Any) -> str | None:
    """Test one attention layer.

    Args:
        layer: vLLM's ``Attention`` layer, with its cache.
        builder: the stock metadata builder of its group.
        runner: gives the dtype of queries, keys and values, and the device.

    Returns:
        What is wrong, or ``None``.
    """
    case = _Case(layer, runner, _chain(), _BASES[0])
    reason = _difference(case, case.stock(builder), "the stock kernel")
    return reason or trees_test(layer, runner)


def trees_test(layer: Any, runner: Any) -> str | None:
    """Compare random trees, one for every launch shape, with dense attention.

    Args:
        layer: as `self_test`.
        runner: as there.

    Returns:
        What is wrong, or ``None``.
    """
    group = layer.impl.num_heads // layer.impl.num_kv_heads
    sizes = sorted({max(-(-stacked // group), 3) for stacked in _STACKED_ROWS})
    for index, rows in enumerate(sizes, start=1):
        case = _Case(layer, runner, _random_tree(rows - 1), _BASES[index % 2])
        reason = _difference(case, case.dense(), "dense masked attention")
        if reason is not None:
            return reason
    return None


def _difference(case: _Case, expected: torch.Tensor, name: str) -> str | None:
    quantised = case.layer.kv_cache.element_size() == 1
    tolerance = _TOLERANCE_FLOAT8 if quantised else _TOLERANCE[case.query.dtype]
    error = float((case.tree_attention().double() - expected.double()).abs().max())
    if not math.isfinite(error) or error > tolerance:
        return f"self-test: tree attention differs from {name} by {error:.2g}"
    return None


def _chain() -> TokenTree:
    return TokenTree.chain(list(range(_CHAIN_NODES)), [0.5] * _CHAIN_NODES)


def _random_tree(nodes: int) -> TokenTree:
    rng = np.random.default_rng(nodes)
    parents = tuple(int(rng.integers(-1, node)) for node in range(nodes))
    return TokenTree(tuple(range(nodes)), parents, (0.5,) * nodes)


def scratch_like(cache: torch.Tensor, blocks: int) -> torch.Tensor:
    """A zeroed cache of ``blocks`` blocks whose dimensions lie in memory in the same order."""
    shape = list(cache.shape)
    shape[1 if cache.ndim == 5 and shape[0] == 2 else 0] = blocks
    strides = cache.stride()
    order = sorted(range(cache.ndim), key=lambda d: (-strides[d], d))
    made = torch.zeros([shape[d] for d in order], dtype=cache.dtype, device=cache.device)
    return made.permute([order.index(d) for d in range(cache.ndim)])


class _Case:
    """Random keys and values of one request, written into a scratch cache with shuffled blocks."""

    def __init__(self, layer: Any, runner: Any, tree: TokenTree, base: int) -> None:
        impl, cache = layer.impl, layer.kv_cache
        generator = torch.Generator().manual_seed(base)
        self.layer, self.impl, self.tree, self.base = layer, impl, tree, base
        self.size = len(tree) + 1
        self.total = total = base + self.size
        page = cache.shape[2]  # in every layout
        blocks = -(-total // page)
        self.cache = scratch_like(cache, blocks + 3)
        table = 1 + torch.randperm(blocks + 2, generator=generator)[:blocks]
        slots = torch.arange(total)
        self.slots = (table[slots // page] * page + slots % page).to(cache.device)
        self.table = table[None].to(cache.device, torch.int32)

        def random(rows: int, heads: int) -> torch.Tensor:
            shape = (rows, heads, impl.head_size)
            return torch.randn(shape, generator=generator).to(cache.device, runner.dtype)

        self.keys = random(total, impl.num_kv_heads)
        self.values = random(total, impl.num_kv_heads)
        self.query = random(self.size, impl.num_heads)
        impl.do_kv_cache_update(layer, self.keys, self.values, self.cache, self.slots)

    def forward(self, metadata: Any) -> torch.Tensor:
        """The implementation's own forward, quantising the queries where the layer would."""
        query = self.query
        if getattr(self.layer, "query_quant", None) and self.impl.supports_quant_query_input:
            query, _ = self.layer.query_quant(query, self.layer._q_scale)
            query = query.view(self.query.shape)
        output = torch.full_like(self.query, float("nan"))
        fresh = slice(self.base, None)
        self.impl.forward(
            self.layer, query, self.keys[fresh], self.values[fresh], self.cache, metadata, output
        )
        return output

    def tree_attention(self) -> torch.Tensor:
        """Ours, through the implementation's own forward."""
        rows = torch.arange(self.size, device=self.cache.device)
        attention = AttentionStep([TreeRows.build(0, 0, self.base, self.tree)], rows, True)
        step = DeviceStep.build(
            Step([self.tree], [0], attention, 0),
            np.array([0, self.size], dtype=np.int32),
            np.array([self.base], dtype=np.int32),
            processors=_MANY_PROCESSORS,
        )
        launch = TreeLaunch(step, self.table)
        return self.forward(SimpleNamespace(**{LAUNCH_ATTRIBUTE: launch}))

    def stock(self, builder: Any) -> torch.Tensor:
        """The stock kernel, which takes the rows for a chain."""
        device = self.cache.device
        given = {
            "query_start_loc": torch.tensor([0, self.size], dtype=torch.int32, device=device),
            "query_start_loc_cpu": torch.tensor([0, self.size], dtype=torch.int32),
            "seq_lens": torch.tensor([self.total], dtype=torch.int32, device=device),
            "seq_lens_cpu_upper_bound": torch.tensor([self.total], dtype=torch.int32),
            "num_reqs": 1,
            "num_actual_tokens": self.size,
            "max_query_len": self.size,
            "max_seq_len": self.total,
            "block_table_tensor": self.table,
            "slot_mapping": self.slots[self.base :],
            "causal": True,
        }
        known = {f.name for f in dataclasses.fields(CommonAttentionMetadata)}
        common = CommonAttentionMetadata(**{k: v for k, v in given.items() if k in known})
        return self.forward(builder.build(0, common))

    def dense(self) -> torch.Tensor:
        """Masked attention over the plain keys and values, in float64."""
        base, size, total = self.base, self.size, self.total
        group = self.impl.num_heads // self.impl.num_kv_heads
        query, keys, values = (t.cpu().double() for t in (self.query, self.keys, self.values))
        keys, values = (t.repeat_interleave(group, dim=1) for t in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", query, keys) * self.impl.scale
        cap = self.impl.logits_soft_cap
        if cap:
            scores = cap * torch.tanh(scores / cap)
        seen = torch.ones((size, total), dtype=torch.bool)
        seen[:, base + 1 :] = False
        position = torch.arange(total)
        for node, parent in enumerate(self.tree.parents):  # not the mask under test: from the tree
            seen[node + 1] = seen[parent + 1]
            seen[node + 1, base + 1 + node] = True
            position[base + 1 + node] = position[base + 1 + parent] + 1
        window = window_of(self.impl)
        if window >= 0:
            seen &= position[base:, None] - position[None, :] < window
        weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", weights, values).to(self.cache.device)
