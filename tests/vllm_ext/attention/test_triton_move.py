# SPDX-License-Identifier: Apache-2.0
"""Moving accepted nodes by Triton against reading everything first: interpreted, or on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.vllm_ext.attention.dense import empty_cache

pytestmark = pytest.mark.interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = ["BHN2D", "BNH2D", "2BNHD", "B2NHD"]
BLOCKS, PAGE = 6, 16


class Batch:
    """Layers with random caches, and paths of requests that share no block."""

    def __init__(
        self,
        layout: str = "BHN2D",
        dtype: torch.dtype = torch.bfloat16,
        paths: tuple[tuple[int, ...], ...] = ((1, 3, 6, 7), (0, 2, 5)),
        layers: int = 3,
        heads: int = 2,
        size: int = 24,
        seed: int = 0,
    ) -> None:
        chance = torch.Generator().manual_seed(seed)
        self.views = []
        for _ in range(layers):
            cache, keys, values = empty_cache(layout, BLOCKS, PAGE, heads, size, dtype)
            raw = cache.view(torch.uint8)
            raw.copy_(torch.randint(0, 256, raw.shape, generator=chance, dtype=torch.uint8))
            assert keys.data_ptr() != values.data_ptr()
            self.views.append((keys.to(DEVICE), values.to(DEVICE)))
        order = torch.randperm(BLOCKS, generator=chance)
        slots, moves, starts = [], [], [0]
        for request, path in enumerate(paths):
            # Two blocks of a request; its tree crosses their border.
            blocks = order[2 * request : 2 * request + 2]
            first = sum(map(len, slots))
            rows = torch.arange(PAGE - 3, PAGE + 13)
            slots.append(blocks[rows // PAGE] * PAGE + rows % PAGE)
            placed = list(enumerate(path, start=1))
            moves += [(first + 1 + node, first + depth) for depth, node in placed]
            starts.append(len(moves))
        self.slots = torch.cat(slots).to(DEVICE)
        self.moves = torch.tensor(moves, dtype=torch.int64, device=DEVICE).reshape(-1, 2).T
        self.moves = self.moves.contiguous()
        self.starts = torch.tensor(starts, dtype=torch.int64, device=DEVICE)

    def expected(self) -> list[torch.Tensor]:
        """Bits of keys and values when all is read before anything is written."""
        source, target = (self.slots[rows] for rows in self.moves)
        made = []
        for view in (view for pair in self.views for view in pair):
            bits = bits_of(view).clone()
            read = bits[source // PAGE, source % PAGE]
            bits[target // PAGE, target % PAGE] = read
            made.append(bits)
        return made

    def moved(self) -> list[torch.Tensor]:
        from vllm_ext.attention.triton_move import Caches, move_paths

        move_paths(Caches.of(self.views), self.slots, self.moves, self.starts)
        return [bits_of(view) for pair in self.views for view in pair]


def bits_of(view: torch.Tensor) -> torch.Tensor:
    return view.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[view.element_size()])


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_every_layout_and_dtype(layout: str, dtype: torch.dtype) -> None:
    batch = Batch(layout, dtype)
    wanted = batch.expected()
    assert not same([bits_of(v) for pair in batch.views for v in pair], wanted)  # something moves
    assert same(batch.moved(), wanted)


@st.composite
def paths(draw: Any) -> tuple[int, ...]:
    """Accepted nodes of a tree of 15, each behind the one before it."""
    return tuple(sorted(draw(st.sets(st.integers(0, 14), max_size=8))))


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(st.lists(paths(), min_size=1, max_size=3), st.integers(1, 3), st.integers(0, 10**6))
def test_random_paths(taken: list[tuple[int, ...]], heads: int, seed: int) -> None:
    batch = Batch(paths=tuple(taken), layers=2, heads=heads, seed=seed)
    wanted = batch.expected()
    assert same(batch.moved(), wanted)


def test_what_goes_wrong_is_seen() -> None:
    """The controls: a slot, an order, a layer or a path that is not the right one."""

    def wrong(change: Any) -> bool:
        batch = Batch()
        wanted = batch.expected()
        change(batch)
        return not same(batch.moved(), wanted)

    def another_slot(batch: Batch) -> None:
        batch.slots[2] = batch.slots[15]

    def backwards(batch: Batch) -> None:
        batch.moves = batch.moves.flip(1).contiguous()

    def one_layer_twice(batch: Batch) -> None:
        from vllm_ext.attention import triton_move

        caches = triton_move.Caches.of(batch.views)
        caches.pointers[1] = caches.pointers[0]
        triton_move.move_paths(caches, batch.slots, batch.moves, batch.starts)
        batch.moves = batch.moves[:, :0]
        batch.starts = batch.starts[:1].repeat(2)

    def a_path_less(batch: Batch) -> None:
        batch.starts = batch.starts[:-1]

    assert not wrong(lambda batch: None)
    assert all(map(wrong, [another_slot, backwards, one_layer_twice, a_path_less]))


def test_caches_that_differ_are_refused() -> None:
    from vllm_ext.attention.triton_move import Caches

    one, other = Batch(layers=1), Batch(layers=1, size=32)
    with pytest.raises(ValueError, match="differ"):
        Caches.of([*one.views, *other.views])
    apart = one.views[0][0].transpose(2, 3)
    with pytest.raises(ValueError, match="strides"):
        Caches.of([(apart, apart)])
