# SPDX-License-Identifier: Apache-2.0
"""The compiled tree attention against dense masked attention in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vllm_ext.attention.cpu_kernel import TILE, attend

Floats = NDArray[np.float32]


@dataclass
class Case:
    """A random request: its cache as the engine stores it, and the plain keys and values."""

    base: int
    nodes: int
    heads: int = 6
    kv_heads: int = 2
    size: int = 64
    block_size: int = 32
    window: int = -1
    first: int = 0
    bfloat16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        rows = self.nodes + 1
        total = self.base + rows
        blocks = -(-total // self.block_size)
        shape = (total, self.kv_heads, self.size)
        self.keys, self.values = (self._rounded(rng.standard_normal(shape)) for _ in range(2))
        self.query = rng.standard_normal((rows - self.first, self.heads, self.size), np.float32)
        self.visible = np.eye(rows, dtype=np.bool_)
        self.depths = np.zeros(rows, np.int64)
        for row in range(1, rows):
            parent = int(rng.integers(0, row))
            self.visible[row] |= self.visible[parent]
            self.depths[row] = self.depths[parent] + 1
        self.table = (1 + rng.permutation(blocks)).astype(np.int32)
        # Slots that hold no key of this request must not matter.
        cache = np.full(
            (blocks + 1, self.kv_heads, 2, self.block_size * self.size), 1e6, np.float32
        )
        for slot in range(total):
            block, offset = self.table[slot // self.block_size], slot % self.block_size
            for head in range(self.kv_heads):
                keys = cache[block, head, 0].reshape(self.size, self.block_size)
                keys[:, offset] = self.keys[slot, head]
                values = cache[block, head, 1].reshape(self.block_size, self.size)
                values[offset] = self.values[slot, head]
        bits = cache.view(np.uint32)
        self.cache: NDArray[Any] = (bits >> 16).astype(np.uint16) if self.bfloat16 else bits

    def _rounded(self, values: NDArray[np.float64]) -> Floats:
        single = values.astype(np.float32)
        if self.bfloat16:
            single = (single.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        return single

    def attend(self, **changed: Any) -> Floats:
        """The kernel, on this request or with something changed."""
        out = np.full(self.query.shape, np.nan, np.float32)
        given = {
            "query": self.query,
            "cache": self.cache,
            "table": self.table,
            "base": self.base,
            "visible": self.visible,
            "depths": self.depths,
            "first": self.first,
            "window": self.window,
            "scale": np.float32(self.size**-0.5),
        }
        attend(*(given | changed).values(), out)
        return out

    def dense(self) -> NDArray[np.float64]:
        """Masked attention in float64."""
        group = self.heads // self.kv_heads
        keys = self.keys.astype(np.float64).repeat(group, axis=1)
        values = self.values.astype(np.float64).repeat(group, axis=1)
        scores = np.einsum("qhd,khd->hqk", self.query, keys) * self.size**-0.5
        seen = np.ones((self.nodes + 1, len(keys)), np.bool_)
        seen[:, self.base :] = self.visible
        if self.window >= 0:
            position = np.arange(len(keys))
            position[self.base :] = self.base + self.depths
            seen &= position[self.base :, None] - position[None] < self.window
        scores[:, ~seen[self.first :]] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out: NDArray[np.float64] = np.einsum("hqk,khd->qhd", weights, values)
        return out


CASES = {
    "small": Case(base=5, nodes=3),
    "no context": Case(base=0, nodes=7),
    "one row": Case(base=40, nodes=0),
    "tile border": Case(base=TILE - 2, nodes=6),
    "long": Case(base=700, nodes=24, block_size=128),
    "many nodes": Case(base=130, nodes=127),
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
    np.testing.assert_allclose(case.attend(), case.dense(), atol=2e-6)


@pytest.mark.parametrize("seed", range(20))
def test_equals_dense_attention_on_random_sizes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    case = Case(
        base=int(rng.integers(0, 400)),
        nodes=int(rng.integers(0, 40)),
        window=int(rng.integers(1, 300)) if seed % 2 else -1,
        seed=seed,
    )
    np.testing.assert_allclose(case.attend(), case.dense(), atol=2e-6)


def test_large_scores_do_not_overflow() -> None:
    case = Case(base=100, nodes=4)
    case.query *= 1000.0
    np.testing.assert_allclose(case.attend(), case.dense(), atol=2e-4)


@pytest.mark.parametrize(
    ("changed", "value"),
    [
        ("visible", np.tri(13, dtype=np.bool_)),  # siblings are seen
        ("depths", np.arange(13)),  # positions of a chain, which the window sees
        ("base", 299),
        ("first", 0),
        ("window", -1),
        ("scale", np.float32(0.12)),
    ],
)
def test_every_argument_matters(changed: str, value: Any) -> None:
    case = Case(base=300, nodes=12, window=2, first=1)
    np.testing.assert_allclose(case.attend(), case.dense(), atol=2e-6)
    assert np.abs(case.attend(**{changed: value}) - case.dense()).max() > 1e-2
