# SPDX-License-Identifier: Apache-2.0
"""Tree attention over a paged KV cache, in Triton.

For row i of a tree at ``base``, with a(i) its ancestors, its root and itself::

    out_i = softmax_n(s_in) v,   s_in = cap(scale q_i . k_n),   n in [0, base) or n - base in a(i)

where a layer with a sliding window also asks ``position(i) - position(n) < window``; the position
of slot ``base + j`` is ``base + depth(j)``, that of a context slot is its number.  The mask is that
of SpecInfer (arXiv 2305.09781); the softmax is computed online over key tiles (FlashAttention,
arXiv 2205.14135), in pieces that a second kernel combines by their log-sum-exp when contexts are
long (Flash-Decoding).  The query heads of a group are stacked as rows, so their keys are read once.

Another kernel may have attended to the contexts. Its result (out, lse) is where the online softmax
then starts, maximum lse, sum 1 and total out, and only the trees' own rows are read here.

Needs torch and Triton only.  Under ``TRITON_INTERPRET=1`` it runs on CPU tensors.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_ext.attention.tree_plan import LaunchPlan
from vllm_ext.attention.triton_kernels import combine_kernel, tree_kernel

# Dtype of the factors of a matrix product.  Triton's interpreter cannot multiply bfloat16 matrices;
# float32 holds the rounded factors exactly.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_FACTORS = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.float32 if _INTERPRETED else tl.bfloat16,
}


@dataclass(frozen=True, slots=True)
class Tile:
    """Launch shape of the kernel.

    Attributes:
        block_m: rows times query heads of a group, a power of two of at least 16.
        block_n: slots read at a time, a power of two of at least 16.
        warps: per program.
        stages: of the load pipeline.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int


@functools.cache
def _power_of_2(number: int) -> int:
    """The next one; Triton's function takes microseconds, in every layer."""
    return int(triton.next_power_of_2(number))


@functools.cache
def choose_tile(rows: int, group: int, head_size: int, dtype: torch.dtype) -> Tile:
    """Launch shape for trees of up to ``rows`` rows.

    The largest blocks that compile for sm_90 without spilling registers; for float32, which has no
    matrix units at full precision, with few.
    """
    wide = head_size > 128
    if dtype == torch.float32:
        most, block_n = (16 if wide else 32), 32
    else:
        most, block_n = (64, 32) if wide else (128, 64)
    block_m = min(max(_power_of_2(rows * group), 16), most)
    warps = 8 if wide or block_m == 128 or dtype == torch.float32 else 4
    return Tile(block_m, block_n, warps, 2)


@dataclass(frozen=True, slots=True)
class Context:
    """Attention over the committed contexts alone, by another kernel.

    Attributes:
        attended: [rows, heads, head_size]; last stride 1.
        lse: float32 [heads, rows], natural log-sum-exp of the scaled scores; last stride 1.
    """

    attended: torch.Tensor
    lse: torch.Tensor


@dataclass(frozen=True, slots=True)
class Pieces:
    """Memory for the pieces of split contexts; layers that run one after the other share it.

    Attributes:
        partial: float32 [pieces, heads, head_size].
        lse: float32 [pieces, heads].
    """

    partial: torch.Tensor
    lse: torch.Tensor

    @classmethod
    def of(cls, plan: LaunchPlan, heads: int, head_size: int, device: torch.device) -> Pieces:
        """As much as a plan needs."""
        shape = (plan.partials, heads, head_size)
        partial = torch.empty(shape, dtype=torch.float32, device=device)
        return cls(partial, torch.empty(shape[:2], dtype=torch.float32, device=device))


def tree_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_table: torch.Tensor,
    plan: LaunchPlan,
    tile: Tile,
    output: torch.Tensor,
    scale: float,
    window: int = -1,
    soft_cap: float = 0.0,
    query_scale: torch.Tensor | None = None,
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    pieces: Pieces | None = None,
    context: Context | None = None,
) -> None:
    """Attend the rows of the plan's trees; other rows of ``output`` are not touched.

    The keys and values of the trees' rows must be in the cache already, row i of a tree at slot
    ``base + i``.

    Args:
        query: [rows, heads, head_size]; float32, bfloat16, float16 or float8.
        keys: [blocks, page, kv_heads, head_size], any strides but 1 in the last dimension.
        values: as ``keys``.
        block_table: int32 [requests, pages]; last stride 1.
        plan: made for this ``tile``, the layer's heads and its window.
        tile: launch shape.
        output: [rows, heads, head_size]; float32, bfloat16 or float16.  Products are computed in
            its dtype, sums in float32.
        scale: of the scores.
        window: sliding window in positions, or -1.
        soft_cap: scores become ``cap * tanh(score / cap)``; 0 for none.
        query_scale: float32 [1]; a float8 query times this is the query.
        kv_scales: float32 [1] each; stored keys and values times these are the keys and values.
        pieces: of the plan, if others have made them already.
        context: what the rows attend to in the committed contexts, if the plan leaves those out.

    Raises:
        ValueError: a tensor whose last dimension is not contiguous, heads that do not divide, or a
            context together with scaled values.
    """
    heads, head_size = query.shape[1:]
    page, kv_heads = keys.shape[1:3]
    if not query.stride(2) == keys.stride(3) == values.stride(3) == output.stride(2) == 1:
        named = {"query": query, "keys": keys, "values": values, "output": output}
        strides = {name: tensor.stride() for name, tensor in named.items()}
        raise ValueError(f"the last stride of each must be 1, given are {strides}")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key heads")
    if context is not None and kv_scales is not None:
        raise ValueError("a context attended elsewhere cannot be scaled with the values here")
    if pieces is None:
        pieces = Pieces.of(plan, heads, head_size, query.device)
    partial, lse = pieces.partial, pieces.lse
    unit = lse  # never read where the flag is off
    key_scale, value_scale = kv_scales or (unit, unit)
    before = context or Context(unit, unit)
    head_padded = _power_of_2(head_size)
    tree_kernel[(len(plan.items), kv_heads)](
        output,
        partial,
        lse,
        query,
        keys,
        values,
        block_table,
        plan.trees,
        plan.rows,
        plan.words,
        plan.items,
        unit if query_scale is None else query_scale,
        key_scale,
        value_scale,
        before.attended,
        before.lse,
        scale,
        soft_cap,
        window,
        plan.chunk,
        heads,
        output.stride(0),
        output.stride(1),
        query.stride(0),
        query.stride(1),
        *keys.stride()[:3],
        *values.stride()[:3],
        block_table.stride(0),
        *before.attended.stride()[:2],
        before.lse.stride(0),
        GROUP=heads // kv_heads,
        PAGE=page,
        HEAD=head_size,
        HEAD_PADDED=head_padded,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        WINDOWED=window >= 0,
        CAPPED=soft_cap > 0.0,
        QUERY_SCALED=query_scale is not None,
        KV_SCALED=kv_scales is not None,
        RESUMED=context is not None,
        FACTOR=_FACTORS[output.dtype],
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if plan.partials:
        combine_kernel[(len(plan.rows), heads)](
            output,
            partial,
            lse,
            plan.trees,
            plan.rows,
            output.stride(0),
            output.stride(1),
            HEAD=head_size,
            HEAD_PADDED=head_padded,
            num_warps=1,
        )
