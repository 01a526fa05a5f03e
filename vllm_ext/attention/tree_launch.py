# SPDX-License-Identifier: Apache-2.0
"""One step's trees on their way to the Triton kernel, shared by all layers of the model.

In a step with a branching tree the decoding requests ride in one launch: branching trees, chains
and single rows alike, so that their contexts are read once.  Prompt chunks stay on the stock
kernel, which then runs for the whole batch before the launch overwrites the other rows.  A step
without a branching tree never gets here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides

from vllm_ext.attention.flash_context import attend_contexts
from vllm_ext.attention.tree_plan import MAX_ROWS, LaunchPlan, RowTree, plan_launch
from vllm_ext.attention.triton_tree import Pieces, Tile, choose_tile, tree_attention
from vllm_ext.worker.step import AttentionStep, Step

LAUNCH_ATTRIBUTE = "vllm_ext_launch"
"""Attribute of vLLM's attention metadata that holds the :class:`TreeLaunch`."""

ROUTE_ATTRIBUTE = "_vllm_ext_route"
"""Attribute of an attention implementation: the :class:`vllm_ext.attention.route.Route`, if any."""

_VIEWS_ATTRIBUTE = "_vllm_ext_views"
"""Attribute of an attention implementation: its cache, and the views of keys and values."""

_FLOAT8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
CACHE_DTYPES = ("auto", "float16", "bfloat16", *_FLOAT8)
"""``kv_cache_dtype`` values whose elements the kernel can read."""


@dataclass(frozen=True, slots=True)
class Contexts:
    """The committed contexts of a step's requests.

    Attributes:
        starts: int32 [requests + 1]; first batch row of each request.
        rows: of all requests.
        bases: int32 [requests]; their tokens.
        longest: tokens of the longest.
    """

    starts: torch.Tensor
    rows: int
    bases: torch.Tensor
    longest: int


@dataclass(slots=True)
class DeviceStep:
    """The rows that the kernel attends in this step, with plans made as layers ask for them.

    Attributes:
        trees: the riding requests.
        everything: whether no row is left to the stock kernel.
        step: the branching trees, for the stash.
        processors: multiprocessors of the device.
        most_rows: rows of the largest tree.
        mean_context: committed tokens of a request.
    """

    trees: list[RowTree]
    everything: bool
    step: AttentionStep
    processors: int
    most_rows: int = field(init=False)
    mean_context: float = field(init=False)
    _plans: dict[tuple[Any, ...], tuple[LaunchPlan, Pieces]] = field(default_factory=dict)
    _contexts: Contexts | None = None
    _scratch: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.most_rows = max(len(tree.depths) for tree in self.trees)
        self.mean_context = sum(tree.base for tree in self.trees) / len(self.trees)

    @classmethod
    def build(
        cls,
        step: Step,
        query_starts: NDArray[np.int32],
        bases: NDArray[np.int32],
        processors: int,
    ) -> DeviceStep:
        """Lay out a step that has branching trees.

        Args:
            step: of the runner.
            query_starts: int32 [requests + 1]; first batch row of each request.
            bases: int32 [requests]; position of each request's first row.
            processors: multiprocessors of the device.
        """
        assert step.attention is not None
        branching = {tree.request: tree for tree in step.attention.trees}
        trees: list[RowTree] = []
        for request, drafted in enumerate(step.trees):
            start = int(query_starts[request])
            rows = int(query_starts[request + 1]) - start
            tree = branching.get(request)
            if tree is not None:
                trees.append(RowTree.build(request, start, tree.base, tree.visible, tree.depths))
            elif rows == len(drafted) + 1 <= MAX_ROWS:
                trees.append(RowTree.chain(request, start, int(bases[request]), rows))
        return cls(trees, len(trees) == len(step.trees), step.attention, processors)

    def contexts(self, device: torch.device) -> Contexts:
        """The contexts, if every row rides; copied to the device once."""
        if self._contexts is None:
            bases = [tree.base for tree in self.trees]
            ends = [tree.start + len(tree.depths) for tree in self.trees]
            both = torch.tensor([*bases, 0, *ends], dtype=torch.int32)
            if device.type == "cuda":
                both = both.pin_memory().to(device, non_blocking=True)
            count = len(bases)
            self._contexts = Contexts(both[count:], ends[-1], both[:count], max(bases))
        return self._contexts

    def scratch(self, query: torch.Tensor) -> torch.Tensor:
        """Memory like the queries of a layer; layers that run one after the other share it."""
        kind = (query.shape, query.dtype)
        found = self._scratch.get(kind)
        if found is None:
            found = self._scratch[kind] = torch.empty_like(query)
        return found

    def plan(
        self,
        heads: int,
        kv_heads: int,
        head_size: int,
        window: int,
        tile: Tile,
        device: Any,
        context: bool,
    ) -> tuple[LaunchPlan, Pieces]:
        """The plan for layers of one kind, and their memory; made once per step."""
        kind = (heads, kv_heads, head_size, window, tile, context)
        found = self._plans.get(kind)
        if found is None:
            plan = plan_launch(
                self.trees,
                heads // kv_heads,
                kv_heads,
                window,
                tile.block_m,
                tile.block_n,
                self.processors,
                device,
                context=context,
            )
            found = self._plans[kind] = plan, Pieces.of(plan, heads, head_size, device)
        return found


@dataclass(slots=True)
class TreeLaunch:
    """What the layers of one KV group need; attached to their attention metadata.

    Attributes:
        step: shared by all groups.
        block_table: int32 [requests, pages] of the group.
    """

    step: DeviceStep
    block_table: torch.Tensor

    def attend(
        self,
        impl: Any,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Attend the riding rows of one layer; see ``tree_attention``.

        Args:
            impl: the layer's attention implementation.
            layer: vLLM's ``Attention`` layer, with the scales of a quantised cache.
            query: [rows, heads, head_size].
            kv_cache: the layer's cache, with the keys and values of this step already written.
            output: [rows, heads, head_size].
        """
        heads, kv_heads, size = impl.num_heads, impl.num_kv_heads, impl.head_size
        window = window_of(impl)
        tile = choose_tile(self.step.most_rows, heads // kv_heads, size, output.dtype)
        route = getattr(impl, ROUTE_ATTRIBUTE, None)
        apart = (
            route is not None
            and self.step.everything
            and route.splits(len(self.step.trees), self.step.mean_context)
        )
        plan, pieces = self.step.plan(
            heads, kv_heads, size, window, tile, query.device, context=not apart
        )
        known = getattr(impl, _VIEWS_ATTRIBUTE, None)
        if known is None or known[0] is not kv_cache:
            known = kv_cache, key_value_views(kv_cache, size, impl.kv_cache_dtype)
            setattr(impl, _VIEWS_ATTRIBUTE, known)
        keys, values = known[1]
        context = None
        if apart:
            context = attend_contexts(impl, query, keys, values, self.block_table, self.step)
        tree_attention(
            query,
            keys,
            values,
            self.block_table,
            plan,
            tile,
            output,
            impl.scale,
            window,
            float(impl.logits_soft_cap or 0.0),
            query_scale=layer._q_scale if query.dtype in _FLOAT8.values() else None,
            kv_scales=(layer._k_scale, layer._v_scale) if is_quantised(impl) else None,
            pieces=pieces,
            context=context,
        )


def is_quantised(impl: Any) -> bool:
    """Whether the cache of an implementation is stored in 8 bits."""
    return impl.kv_cache_dtype in _FLOAT8


def window_of(impl: Any) -> int:
    """Sliding window of an implementation in positions, its own included, or -1.

    vLLM's CUDA backends keep (positions before, positions after), -1 for no limit.
    """
    window: int | Sequence[int] | None = impl.sliding_window
    if window is None:
        return -1
    before = window if isinstance(window, int) else window[0]
    return before + 1 if before >= 0 else -1


def key_value_views(
    cache: torch.Tensor, head_size: int, cache_dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, [blocks, page, kv_heads, head_size] each, of a CUDA cache.

    Args:
        cache: [blocks, kv_heads, page, 2 * head_size] (vLLM 0.32), [2, blocks, page, kv_heads,
            head_size] or [blocks, 2, page, kv_heads, head_size] (before), in any memory order.
        head_size: of the layer.
        cache_dtype: vLLM's ``kv_cache_dtype``; float8 is stored as bytes.

    Raises:
        ValueError: the cache has none of these shapes.
    """
    if cache_dtype in _FLOAT8 and cache.element_size() == 1:
        cache = cache.view(_FLOAT8[cache_dtype])
    if cache.ndim == 4 and cache.shape[3] == 2 * head_size:
        cache = cache.transpose(1, 2)
        keys, values = cache[..., :head_size], cache[..., head_size:]
    elif cache.ndim == 5 and cache.shape[4] == head_size and 2 in cache.shape[:2]:
        keys, values = cache.unbind(0 if cache.shape[0] == 2 else 1)
    else:
        raise ValueError(f"KV cache of shape {tuple(cache.shape)} for head size {head_size}")
    # FlashAttention's loads want every stride aligned, also where a dimension has size 1.
    return canonicalize_singleton_dim_strides(keys), canonicalize_singleton_dim_strides(values)
