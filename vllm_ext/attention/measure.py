# SPDX-License-Identifier: Apache-2.0
"""What tree attention costs on a GPU, beside one-token decoding and the bytes that must be read.

Needs torch and Triton only.  The floor of a call is the memory that it cannot avoid, over the
bandwidth that a plain copy reaches on the same card: keys and values of the context and of the
tree, queries and outputs.  The target of verifying a tree is at most 1.15 times the time of the
stock one-token kernel plus the floor of what the tree adds to it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_ext.attention.tree_plan import LaunchPlan, RowTree, plan_launch
from vllm_ext.attention.triton_move import Caches, move_paths
from vllm_ext.attention.triton_tree import Context, Pieces, Tile, choose_tile, tree_attention

if TYPE_CHECKING:
    from vllm_ext.attention.measure_flash import Flash

TARGET = 1.15
PAGE = 16
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True, slots=True)
class Shape:
    """Attention of one layer on one GPU."""

    name: str
    heads: int
    kv_heads: int
    head_size: int


SHAPES = (Shape("Llama-8B", 32, 8, 128), Shape("Llama-70B-TP8", 8, 1, 128))


def call_bytes(shape: Shape, batch: int, context: int, rows: int, itemsize: int) -> int:
    """Bytes that attention of ``rows`` rows per request moves at least.

    Args:
        shape: of the layer.
        batch: requests.
        context: committed tokens of a request.
        rows: root and nodes of a request.
        itemsize: bytes of an element, of the cache and of queries and outputs alike.
    """
    cached = 2 * (context + rows) * shape.kv_heads
    activations = 2 * rows * shape.heads
    return batch * (cached + activations) * shape.head_size * itemsize


@dataclass(frozen=True, slots=True)
class Timing:
    """Median and spread of one call, in microseconds.

    Attributes:
        median: half of the calls took less.
        low: a fifth took less.
        high: four fifths took less.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table; times in microseconds.

    Attributes:
        shape: name.
        batch: requests.
        context: committed tokens of a request.
        nodes: of each tree, its root aside.
        tree: tree attention.
        one_row: the same kernel on one row per request.
        stock: the stock kernel on one row per request, or ``None`` if none is installed.
        floor: of the tree call.
        added: floor of what the tree adds to one row.
        host: time to queue the call.
        flash: trees whose contexts FlashAttention reads, or ``None``.
        flash_host: time to queue that call, or ``None``.
    """

    shape: str
    batch: int
    context: int
    nodes: int
    tree: Timing
    one_row: Timing
    stock: Timing | None
    floor: float
    added: float
    host: float
    flash: Timing | None = None
    flash_host: float | None = None

    @property
    def ratio(self) -> float:
        """The faster route over one-token decoding plus what the tree adds; the target is 1.15."""
        decode = self.stock or self.one_row
        best = min(route.median for route in (self.tree, self.flash) if route is not None)
        return best / (decode.median + self.added)

    def as_json(self) -> dict[str, Any]:
        """Plain types."""
        return {**asdict(self), "ratio": self.ratio}


def table(results: Sequence[Result]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| shape | batch | context | nodes | tree, us | FlashAttention + tree, us | one row, us "
        "| stock, us | floor, us | faster / (decode + added) | host, us |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        stock = f"{r.stock.median:.1f}" if r.stock else "-"
        host = f"{r.host:.0f}" + (f", {r.flash_host:.0f}" if r.flash_host is not None else "")
        lines.append(
            f"| {r.shape} | {r.batch} | {r.context} | {r.nodes} "
            f"| {_spread(r.tree)} | {_spread(r.flash) if r.flash else '-'} "
            f"| {r.one_row.median:.1f} | {stock} | {r.floor:.1f} "
            f"| {r.ratio:.2f}{' *' if r.ratio > TARGET else ''} | {host} |"
        )
    missed = sum(r.ratio > TARGET for r in results)
    lines.append(f"\n\\* above the target of {TARGET}: {missed} of {len(results)}")
    return "\n".join(lines)


def _spread(timing: Timing) -> str:
    return f"{timing.median:.1f} ({timing.low:.1f}-{timing.high:.1f})"


def random_tree(request: int, start: int, base: int, nodes: int, seed: int) -> RowTree:
    """A random tree: each node's parent is any earlier row."""
    rng = np.random.default_rng(seed)
    visible = np.eye(nodes + 1, dtype=np.bool_)
    depths = np.zeros(nodes + 1, dtype=np.int64)
    for row in range(1, nodes + 1):
        parent = int(rng.integers(0, row))
        visible[row] |= visible[parent]
        depths[row] = depths[parent] + 1
    return RowTree.build(request, start, base, visible, depths)


class Bench:
    """Random queries, trees and a random paged cache whose blocks are shuffled.

    Args:
        shape: of the layer.
        batch: requests.
        context: committed tokens of a request.
        nodes: of each tree.
        dtype: of everything.
        device: of everything.
    """

    def __init__(
        self,
        shape: Shape,
        batch: int,
        context: int,
        nodes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shape, self.batch, self.context, self.nodes = shape, batch, context, nodes
        self.dtype, self.device = dtype, device
        pages = -(-(context + nodes + 1) // PAGE)
        cache = (batch * pages, PAGE, shape.kv_heads, 2 * shape.head_size)
        self.cache = torch.randn(cache, dtype=dtype, device=device)
        order = torch.randperm(batch * pages, device=device)
        self.block_table = order.view(batch, pages).to(torch.int32)
        self.query = torch.randn(
            (batch * (nodes + 1), shape.heads, shape.head_size), dtype=dtype, device=device
        )
        self.output = torch.empty_like(self.query)
        self.scale = shape.head_size**-0.5
        self.trees = [random_tree(i, i * (nodes + 1), context, nodes, i) for i in range(batch)]

    @property
    def keys(self) -> torch.Tensor:
        """Keys, [blocks, page, kv_heads, head_size]."""
        return self.cache[..., : self.shape.head_size]

    @property
    def values(self) -> torch.Tensor:
        """Values, as the keys."""
        return self.cache[..., self.shape.head_size :]

    def plan(self, rows: int, context: bool = True) -> tuple[LaunchPlan, Tile]:
        """Plan for the trees, or for one row per request, with or without the contexts."""
        shape = self.shape
        group = shape.heads // shape.kv_heads
        trees = self.trees
        if rows == 1:
            trees = [RowTree.chain(i, i, self.context, 1) for i in range(self.batch)]
        tile = choose_tile(rows, group, shape.head_size, self.dtype)
        processors = 1
        if self.device.type == "cuda":
            processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        made = plan_launch(
            trees,
            group,
            shape.kv_heads,
            -1,
            tile.block_m,
            tile.block_n,
            processors,
            self.device,
            context=context,
        )
        return made, tile

    def call(self, rows: int, contexts: Callable[[], Context] | None = None) -> Callable[[], None]:
        """The kernel on the trees, or on one row per request.

        Args:
            rows: of each request.
            contexts: attends to the contexts, if the kernel does not.
        """
        plan, tile = self.plan(rows, context=contexts is None)
        # As in a step, where all layers share it.
        pieces = Pieces.of(plan, self.shape.heads, self.shape.head_size, self.device)

        def run() -> None:
            tree_attention(
                self.query,
                self.keys,
                self.values,
                self.block_table,
                plan,
                tile,
                self.output,
                self.scale,
                pieces=pieces,
                context=contexts() if contexts else None,
            )

        return run

    def error(self, contexts: Callable[[], Context] | None = None) -> float:
        """Largest relative error of a row against dense masked attention in float64."""
        self.output.fill_(float("nan"))
        self.call(self.nodes + 1, contexts)()
        worst = 0.0
        group = self.shape.heads // self.shape.kv_heads
        for tree in self.trees:
            size = len(tree.depths)
            slots = torch.arange(self.context + size, device=self.device)
            block = self.block_table[tree.request].long()[slots // PAGE]
            keys = self.keys[block, slots % PAGE].double().repeat_interleave(group, dim=1)
            values = self.values[block, slots % PAGE].double().repeat_interleave(group, dim=1)
            bits = np.unpackbits(tree.words.view(np.uint8), axis=1, bitorder="little")
            seen = torch.ones((size, len(slots)), dtype=torch.bool)
            seen[:, self.context :] = torch.from_numpy(bits[:, :size] == 1)
            rows = slice(tree.start, tree.start + size)
            score = torch.einsum("qhd,khd->hqk", self.query[rows].double(), keys) * self.scale
            weight = score.masked_fill(~seen.to(self.device), float("-inf")).softmax(dim=-1)
            expected = torch.einsum("hqk,khd->qhd", weight, values)
            wrong = (self.output[rows].double() - expected).norm(dim=-1) / expected.norm(dim=-1)
            worst = max(worst, float(wrong.max()))
        return worst

    def measure(self, flash: Flash | None, rate: float) -> Result:
        """Time the trees by both routes, one row per request, and the stock kernel.

        Args:
            flash: the stock kernel, if there is one.
            rate: bytes per microsecond of the device's memory.
        """
        rows, itemsize = self.nodes + 1, self.query.element_size()
        run = self.call(rows)
        tree = timed(run)
        both = self.call(rows, flash.contexts(self)) if flash else None
        whole = call_bytes(self.shape, self.batch, self.context, rows, itemsize)
        single = call_bytes(self.shape, self.batch, self.context, 1, itemsize)
        return Result(
            self.shape.name,
            self.batch,
            self.context,
            self.nodes,
            tree,
            timed(self.call(1)),
            timed(flash.decode(self)) if flash else None,
            whole / rate,
            (whole - single) / rate,
            queued(run),
            timed(both) if both else None,
            queued(both) if both else None,
        )


def timed(run: Callable[[], Any]) -> Timing:
    """Time of a call on the device, caches cold; in the interpreter one call on the clock."""
    if INTERPRETED:
        begin = time.perf_counter()
        run()
        spent = 1e6 * (time.perf_counter() - begin)
        return Timing(spent, spent, spent)
    from triton.testing import do_bench

    median, low, high = do_bench(run, quantiles=[0.5, 0.2, 0.8])
    return Timing(1e3 * median, 1e3 * low, 1e3 * high)


def queued(run: Callable[[], Any], calls: int = 20) -> float:
    """Microseconds that the host needs to queue a call."""
    calls = 1 if INTERPRETED else calls
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    spent = 1e6 * (time.perf_counter() - begin) / calls
    if not INTERPRETED:
        torch.cuda.synchronize()
    return spent


def commit_call(
    shape: Shape, layers: int, batch: int, nodes: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    """The launch that commits a step.

    Args:
        shape: of a layer.
        layers: of the model.
        batch: requests.
        nodes: that each has accepted, none of them where it belongs.
        dtype: of the cache.
        device: of the cache.
    """
    pages = -(-2 * (nodes + 1) // PAGE)
    size = (batch * pages, PAGE, shape.kv_heads, 2 * shape.head_size)
    stored = [torch.randn(size, dtype=dtype, device=device) for _ in range(layers)]
    caches = Caches.of([(c[..., : shape.head_size], c[..., shape.head_size :]) for c in stored])
    first = torch.arange(batch, device=device)[:, None] * pages * PAGE
    row = torch.arange(1, nodes + 1, device=device)
    slots = torch.arange(batch * pages * PAGE, device=device)
    moves = torch.stack([(first + 2 * row).flatten(), (first + row).flatten()])
    starts = torch.arange(batch + 1, device=device) * nodes
    return lambda: move_paths(caches, slots, moves, starts)


def copy_rate(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes per microsecond that a copy reads and writes on the device."""
    source = torch.empty(size // (1024 if INTERPRETED else 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / timed(lambda: target.copy_(source)).median


def grid(
    shapes: Sequence[Shape], batches: Sequence[int], contexts: Sequence[int], nodes: Sequence[int]
) -> Iterator[tuple[Shape, int, int, int]]:
    """All combinations, the largest cache of a shape last."""
    for shape in shapes:
        for batch in batches:
            for context in contexts:
                for count in nodes:
                    yield shape, batch, context, count
