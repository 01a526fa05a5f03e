# SPDX-License-Identifier: Apache-2.0
"""Random tree batches over a paged cache, and dense masked attention over them in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from proposers.tree import TokenTree
from vllm_ext.attention.tree_plan import RowTree

POISON = float("nan")


@dataclass
class Case:
    """One launch: its shape, its trees, and everything random about it from one seed."""

    trees: list[tuple[int, TokenTree]]  # base, nodes
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    page: int = 16
    window: int = -1
    soft_cap: float = 0.0
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    layout: str = "BHN2D"
    gap: int = 0  # rows of other requests before each tree
    seed: int = 0
    device: str = "cpu"
    scales: tuple[float, float, float] | None = None  # of query, keys, values
    rows: list[RowTree] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = torch.Generator().manual_seed(self.seed)
        pages = [-(-(base + len(tree) + 1) // self.page) for base, tree in self.trees]
        self.blocks = sum(pages) + 2
        order = torch.randperm(self.blocks, generator=rng)[: sum(pages)]
        self.table = torch.full((len(self.trees), max(pages) + 1), self.blocks + 10**6).int()
        self.scale = self.head_size**-0.5
        start = used = 0
        total = sum(len(tree) + 1 + self.gap for _, tree in self.trees)
        dtype, stored = self.dtype, self.cache_dtype or self.dtype
        self.cache, self.keys, self.values = empty_cache(
            self.layout, self.blocks, self.page, self.kv_heads, self.head_size, stored
        )
        self.query = torch.full((total, self.heads, self.head_size), POISON, dtype=dtype)
        self.plain: list[tuple[torch.Tensor, torch.Tensor]] = []
        for index, (base, tree) in enumerate(self.trees):
            start += self.gap
            size = len(tree) + 1
            self.table[index, : pages[index]] = order[used : used + pages[index]]
            shape = (base + size, self.kv_heads, self.head_size)
            key = torch.randn(shape, generator=rng).to(stored)
            value = torch.randn(shape, generator=rng).to(stored)
            slot = torch.arange(base + size)
            block = self.table[index].long()[slot // self.page]
            self.keys[block, slot % self.page] = key
            self.values[block, slot % self.page] = value
            self.plain.append((key.double(), value.double()))
            shape = (size, self.heads, self.head_size)
            self.query[start : start + size] = torch.randn(shape, generator=rng).to(dtype)
            visible = np.ones((size, size), dtype=bool)
            visible[:, 1:] = False
            visible[1:, 1:] = tree.ancestors()
            depths = np.array([0, *tree.depths])
            self.rows.append(RowTree.build(index, start, base, visible, depths))
            start += size
            used += pages[index]
        for name in ("cache", "keys", "values", "query", "table"):
            setattr(self, name, getattr(self, name).to(self.device))
        if self.device != "cpu":  # views must look into the moved cache
            self.keys, self.values = views(self.layout, self.cache, self.head_size)

    def expected(self) -> torch.Tensor:
        """Dense masked attention, float64 [rows, heads, head_size]; NaN in rows of no tree."""
        out = torch.full(self.query.shape, POISON, dtype=torch.float64)
        query_scale, key_scale, value_scale = self.scales or (1.0, 1.0, 1.0)
        for row, (base, tree), (key, value) in zip(self.rows, self.trees, self.plain, strict=True):
            size, total = len(tree) + 1, len(key)
            group = self.heads // self.kv_heads
            seen = torch.ones((size, total), dtype=torch.bool)
            seen[:, base + 1 :] = False
            position = torch.arange(total)
            for node, parent in enumerate(tree.parents):  # from the tree, not from the words
                seen[node + 1] = seen[parent + 1]
                seen[node + 1, base + 1 + node] = True
                position[base + 1 + node] = position[base + 1 + parent] + 1
            if self.window >= 0:
                seen &= position[base:, None] - position[None, :] < self.window
            rows = slice(row.start, row.start + size)
            query = self.query[rows].cpu().double() * query_scale
            key = key.repeat_interleave(group, dim=1) * key_scale
            value = value.repeat_interleave(group, dim=1) * value_scale
            score = torch.einsum("qhd,khd->hqk", query, key) * self.scale
            if self.soft_cap:
                score = self.soft_cap * torch.tanh(score / self.soft_cap)
            weight = score.masked_fill(~seen, float("-inf")).softmax(dim=-1)
            out[rows] = torch.einsum("hqk,khd->qhd", weight, value)
        return out

    def context(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over the committed contexts alone: [rows, heads, head_size] and its
        log-sum-exp [heads, rows]; poison where there is none.
        """
        attended = torch.full_like(self.query, POISON)
        lse = torch.full((self.heads, len(self.query)), POISON, device=self.device)
        group = self.heads // self.kv_heads
        for row, (base, tree), (key, value) in zip(self.rows, self.trees, self.plain, strict=True):
            if not base:
                continue
            rows = slice(row.start, row.start + len(tree) + 1)
            key, value = (t[:base].repeat_interleave(group, dim=1) for t in (key, value))
            score = torch.einsum("qhd,khd->hqk", self.query[rows].cpu().double(), key) * self.scale
            if self.soft_cap:
                score = self.soft_cap * torch.tanh(score / self.soft_cap)
            found = torch.einsum("hqk,khd->qhd", score.softmax(dim=-1), value)
            attended[rows] = found.to(self.dtype).to(self.device)
            lse[:, rows] = score.logsumexp(dim=-1).float().to(self.device)
        return attended, lse


def empty_cache(
    layout: str, blocks: int, page: int, heads: int, size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A poisoned cache in one of vLLM's layouts, with its key and value views."""
    shape: dict[str, tuple[int, ...]] = {
        "BHN2D": (blocks, heads, page, 2 * size),
        "BNH2D": (blocks, page, heads, 2 * size),
        "2BNHD": (2, blocks, page, heads, size),
        "B2NHD": (blocks, 2, page, heads, size),
    }
    cache = torch.full(shape[layout], POISON).to(dtype)
    return cache, *views(layout, cache, size)


def views(layout: str, cache: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [blocks, page, kv_heads, head_size] in a cache."""
    if layout == "BHN2D":
        cache = cache.transpose(1, 2)
    if layout in ("BHN2D", "BNH2D"):
        return cache[..., :size], cache[..., size:]
    if layout == "2BNHD":
        return cache[0], cache[1]
    return cache[:, 0], cache[:, 1]


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error of a row relative to the row's norm, over the rows that belong to a tree."""
    rows = ~expected.isnan().all(dim=-1)
    error = (ours.cpu().double()[rows] - expected[rows]).norm(dim=-1)
    worst: Any = (error / expected[rows].norm(dim=-1)).max()
    return float(worst)
