# SPDX-License-Identifier: Apache-2.0
"""Tree attention for vLLM's CPU backend.

A tree row sees the committed context of its request and its own ancestors:
``softmax(q K^T * scale + mask) V`` with mask 0 for context and ancestors, -inf for siblings and
their descendants.  All other rows, and every step without a branching tree, run on the stock
kernel.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from vllm_ext.attention.layout import CacheLayout, split_cache
from vllm_ext.worker.step import STEP_ATTRIBUTE, AttentionStep, TreeRows


class Kernel(Protocol):
    """Compiled tree attention of one layer and one tree."""

    def __call__(
        self,
        query: torch.Tensor,
        cache: NDArray[Any],
        placed: tuple[Any, ...],
        window: int,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """Write the attention of the tree's rows.

        Args:
            query: [rows, heads, head_size].
            cache: [blocks, kv_heads, 2, block_size * head_size], from `cache_bits`.
            placed: the tree and where its request lies in the cache, from `place`.
            window: sliding window in positions, or -1.
            scale: of the scores.
            out: written, [rows, heads, head_size].
        """


class TreeCPUAttentionBackend(CPUAttentionBackend):
    """``CPU_ATTN`` with tree rows; everything else is inherited."""

    @staticmethod
    def get_impl_cls() -> type[TreeCPUAttentionBackendImpl]:
        """Return the implementation that knows trees."""
        return TreeCPUAttentionBackendImpl


class TreeCPUAttentionBackendImpl(CPUAttentionBackendImpl):
    """Stock implementation plus tree attention for the rows that need it.

    Attributes:
        layout: of the cache, set by the worker after probing; ``None`` until then and where trees
            are refused.
        kernel: a compiled kernel, where set-up found one right and faster than torch's operators.
    """

    _cache: torch.Tensor | None = None  # that `_bits` is of
    _bits: NDArray[Any]

    layout: CacheLayout | None = None
    kernel: Kernel | None = None

    def why_no_trees(self) -> str | None:
        """Return why this layer cannot verify trees, or ``None`` if it can."""
        if self.attn_type != AttentionType.DECODER:
            return f"attention type {self.attn_type}"
        if self.alibi_slopes is not None:
            return "ALiBi positions"
        if self.sinks is not None:
            return "attention sinks"
        if self.logits_soft_cap:
            return "logits soft cap"
        if self.is_fp8_kv_cache:
            return "quantised KV cache"
        return None

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend; see the stock method.  Only tree rows of ``output`` are written here."""
        step: AttentionStep | None = getattr(attn_metadata, STEP_ATTRIBUTE, None)
        if step is None:
            super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
            return output
        if not step.only_trees:
            super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
        if step.keep and key is not None and self.kv_sharing_target_layer_name is None:
            # Cloned by index_select: under torch.compile the buffers are reused by the next layer.
            step.stash[layer.layer_name] = (
                None
                if self.kernel is not None
                else (key.index_select(0, step.rows), value.index_select(0, step.rows))
            )
        for tree in step.trees:
            rows = slice(tree.start, tree.start + tree.queries)
            if self.kernel is None:
                table = attn_metadata.block_table[tree.request]
                output[rows] = self._attend(step, tree, query[rows], kv_cache, table)
                continue
            # Between two layers the weights of a layer go through the processor's caches: there
            # every operator that need not run here costs several times what it does in a loop.
            bits = self._bits_of(kv_cache)
            place_of = (tree.request, id(attn_metadata))
            placed = step.placed.get(place_of)
            if placed is None:
                placed = step.placed[place_of] = place(tree, attn_metadata.block_table)
            window = self.sliding_window
            self.kernel(query[rows], bits, placed, window, self.scale, output[rows])
        return output

    def move(
        self, kv_cache: torch.Tensor, sources: NDArray[np.int64], targets: NDArray[np.int64]
    ) -> None:
        """Copy keys and values from slots to other slots, in order; needs a compiled `kernel`.

        A path's nodes never lie before their final places, so in the order of the path none is
        overwritten before it is read.
        """
        from vllm_ext.attention.move_kernel import move_slots

        layout = self.layout
        assert layout is not None, "slots moved before the layout was probed"
        keys, values = layout.keys.numpy(), layout.values.numpy()
        move_slots(self._bits_of(kv_cache), keys, values, layout.block_size, sources, targets)

    def _bits_of(self, kv_cache: torch.Tensor) -> NDArray[Any]:
        if self._cache is not kv_cache:
            self._cache, self._bits = kv_cache, cache_bits(kv_cache)
        return self._bits

    def _attend(
        self,
        step: AttentionStep,
        tree: TreeRows,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        table: torch.Tensor,
    ) -> torch.Tensor:
        """Attention of one tree by torch's operators.

        Args:
            step: the step, which caches the mask for its other layers.
            tree: the tree.
            query: [rows, heads, head_size].
            kv_cache: the layer's cache, with the keys and values of this step already written.
            table: the request's blocks in the layer's KV group.

        Returns:
            [rows, heads, head_size].
        """
        layout = self.layout
        assert layout is not None, "tree attention before the layout was probed"
        blocks = -(-(tree.base + tree.size) // layout.block_size)
        table = table[:blocks]
        key_cache, value_cache = split_cache(kv_cache)
        # In float32, as the stock kernel computes; torch's bfloat16 attention rounds the softmax
        # weights to bfloat16 as well.
        keys = layout.read_keys(key_cache.index_select(0, table)).float()
        values = layout.read_values(value_cache.index_select(0, table)).float()
        mask = tree_mask(step, tree, blocks * layout.block_size, self.sliding_window)
        return grouped_attention(query.float(), keys, values, mask[tree.first :], self.scale).to(
            query.dtype
        )


def cache_bits(kv_cache: torch.Tensor) -> NDArray[Any]:
    """A cache's elements as they are: uint16 or uint32 [blocks, kv_heads, 2, elements].

    Args:
        kv_cache: [blocks, kv_heads, block_size, 2 * head_size]; within a block and head all keys
            come before all values.
    """
    integers = torch.uint16 if kv_cache.element_size() == 2 else torch.uint32
    bits: NDArray[Any] = kv_cache.view(integers).view(*kv_cache.shape[:2], 2, -1).numpy()
    return bits


def place(tree: TreeRows, block_table: torch.Tensor) -> tuple[Any, ...]:
    """The arguments of a compiled kernel that all layers of a group share; see its ``attend``.

    Args:
        tree: the tree.
        block_table: int32 [requests, blocks and more], of the group.
    """
    table: NDArray[np.int32] = block_table[tree.request].numpy()
    return table, tree.base, tree.visible, tree.depths, tree.first


def tree_mask(step: AttentionStep, tree: TreeRows, columns: int, window: int) -> torch.Tensor:
    """Additive mask, float32 [rows, columns], of a tree; built once per step.

    Args:
        step: holds the cache of masks.
        tree: the tree; column ``base + i`` is its row i.
        columns: padded number of slots.
        window: sliding window in *positions*, or -1; slots of a tree are not its positions.
    """
    key = (tree.request, columns, window)
    mask = step.masks.get(key)
    if mask is None:
        visible = torch.zeros((tree.size, columns), dtype=torch.bool)
        visible[:, : tree.base] = True
        visible[:, tree.base : tree.base + tree.size] = torch.from_numpy(tree.visible)
        if window >= 0:
            depths = torch.from_numpy(tree.depths)
            position = torch.arange(columns)
            position[tree.base : tree.base + tree.size] = tree.base + depths
            visible &= (tree.base + depths)[:, None] - position[None, :] < window
        mask = torch.zeros((tree.size, columns)).masked_fill_(~visible, float("-inf"))
        step.masks[key] = mask
    return mask


def grouped_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Masked attention with grouped query heads.

    Args:
        query: [rows, heads, head_size].
        keys: [kv_heads, slots, head_size].
        values: [kv_heads, slots, head_size].
        mask: additive [rows, slots].
        scale: of the scores.

    Returns:
        [rows, heads, head_size].
    """
    rows, heads, size = query.shape
    kv_heads = keys.shape[0]
    group = heads // kv_heads
    # The heads of a group share keys: stacked as rows of one head, the keys are read once.
    stacked = query.view(rows, kv_heads, group, size).permute(1, 2, 0, 3)
    attended = torch.nn.functional.scaled_dot_product_attention(
        stacked.reshape(1, kv_heads, group * rows, size),
        keys[None],
        values[None],
        attn_mask=mask.repeat(group, 1)[None, None],
        scale=scale,
    )
    return attended.view(kv_heads, group, rows, size).permute(2, 0, 1, 3).reshape(rows, heads, size)
