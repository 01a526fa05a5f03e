# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels behind :mod:`vllm_ext.attention.triton_tree`, where they are described.

Arguments are pointers and numbers of ``tree_attention`` and its plan; capitals are known when the
kernel is compiled.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend_tile(
    query,
    total,
    best,
    summed,
    key_ptr,
    value_ptr,
    table_ptr,
    slots,
    end,
    visible,
    dims,
    key_strides_block,
    key_stride_slot,
    value_stride_block,
    value_stride_slot,
    scale,
    cap,
    PAGE: tl.constexpr,
    HEAD: tl.constexpr,
    CAPPED: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """One step of the online softmax over the keys and values at ``slots``."""
    inside = slots < end
    block = tl.load(table_ptr + slots // PAGE, mask=inside, other=0).to(tl.int64)
    key_at = block * key_strides_block + (slots % PAGE) * key_stride_slot
    value_at = block * value_stride_block + (slots % PAGE) * value_stride_slot
    # Nothing outside [.., end) is read: what an unused slot holds may be NaN.
    key = tl.load(
        key_ptr + key_at[None, :] + dims[:, None],
        mask=inside[None, :] & (dims < HEAD)[:, None],
        other=0.0,
    ).to(query.dtype)
    score = tl.dot(query.to(FACTOR), key.to(FACTOR), input_precision="ieee") * scale
    if CAPPED:
        # tanh(x) = 1 - 2 / (exp(2x) + 1)
        score = cap * (1.0 - 2.0 / (tl.exp2(score * (2.0 * _LOG2_E / cap)) + 1.0))
    score = tl.where(visible & inside[None, :], score * _LOG2_E, float("-inf"))
    new_best = tl.maximum(best, tl.max(score, 1))
    shift = tl.where(new_best == float("-inf"), 0.0, new_best)  # no key seen yet
    keep = tl.exp2(best - shift)
    weight = tl.exp2(score - shift[:, None])
    value = tl.load(
        value_ptr + value_at[:, None] + dims[None, :],
        mask=inside[:, None] & (dims < HEAD)[None, :],
        other=0.0,
    ).to(query.dtype)
    weighed = tl.dot(weight.to(query.dtype).to(FACTOR), value.to(FACTOR), input_precision="ieee")
    total = total * keep[:, None] + weighed
    return total, new_best, summed * keep + tl.sum(weight, 1)


# The rows of a step change from step to step and must not have the kernel compiled anew.
@triton.jit(do_not_specialize=["context_rows"])
def tree_kernel(
    out_ptr,
    partial_ptr,
    lse_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    trees_ptr,
    rows_ptr,
    words_ptr,
    items_ptr,
    query_scale_ptr,
    key_scale_ptr,
    value_scale_ptr,
    context_ptr,
    context_lse_ptr,
    scale,
    cap,
    window,
    chunk,
    heads,
    out_stride_row,
    out_stride_head,
    query_stride_row,
    query_stride_head,
    key_stride_block,
    key_stride_slot,
    key_stride_head,
    value_stride_block,
    value_stride_slot,
    value_stride_head,
    table_stride,
    context_stride_row,
    context_stride_head,
    context_rows,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    QUERY_SCALED: tl.constexpr,
    KV_SCALED: tl.constexpr,
    RESUMED: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """One row block of one tree against one split of its keys, for one key head."""
    item = tl.program_id(0)
    kv_head = tl.program_id(1)
    tree = tl.load(items_ptr + item * 3)
    row_block = tl.load(items_ptr + item * 3 + 1)
    split = tl.load(items_ptr + item * 3 + 2)
    record = trees_ptr + tree * 8
    request = tl.load(record)
    start = tl.load(record + 1)
    size = tl.load(record + 2)
    base = tl.load(record + 3)
    first_slot = tl.load(record + 4)
    first_row = tl.load(record + 5)
    first_partial = tl.load(record + 6)
    splits = tl.load(record + 7)

    stacked = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    row = stacked // GROUP
    head = kv_head * GROUP + stacked % GROUP
    real = row < size
    dims = tl.arange(0, HEAD_PADDED)
    stored = real[:, None] & (dims < HEAD)[None, :]
    query = tl.load(
        query_ptr
        + (start + row).to(tl.int64)[:, None] * query_stride_row
        + head[:, None] * query_stride_head
        + dims[None, :],
        mask=stored,
        other=0.0,
    ).to(out_ptr.dtype.element_ty)
    word_0 = tl.load(words_ptr + (first_row + row) * 2, mask=real, other=0)
    word_1 = tl.load(words_ptr + (first_row + row) * 2 + 1, mask=real, other=0)
    position = base + tl.load(rows_ptr + (first_row + row) * 2 + 1, mask=real, other=0)
    if QUERY_SCALED:
        scale = scale * tl.load(query_scale_ptr)
    if KV_SCALED:
        scale = scale * tl.load(key_scale_ptr)

    key_ptr += kv_head * key_stride_head
    value_ptr += kv_head * value_stride_head
    table_ptr += request.to(tl.int64) * table_stride
    low = first_slot + split * chunk
    high = tl.minimum(low + chunk, base + size)
    total = tl.zeros([BLOCK_M, HEAD_PADDED], dtype=tl.float32)
    best = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    summed = tl.zeros([BLOCK_M], dtype=tl.float32)
    if RESUMED:
        # The context's own softmax is one key seen before: its log-sum-exp the score, what it
        # attended to the value. Without a context its log-sum-exp is undefined.
        attended = tl.where(real, base, 0) > 0
        at_row = (start + row).to(tl.int64)
        lse = tl.load(context_lse_ptr + head * context_rows + at_row, mask=attended, other=0.0)
        best = tl.where(attended, lse * _LOG2_E, best)
        summed = tl.where(attended, 1.0, summed)
        total = tl.load(
            context_ptr
            + at_row[:, None] * context_stride_row
            + head[:, None] * context_stride_head
            + dims[None, :],
            mask=attended[:, None] & (dims < HEAD)[None, :],
            other=0.0,
        ).to(tl.float32)

    context_end = tl.minimum(high, base)
    for tile in range(low, context_end, BLOCK_N):
        slots = tile + tl.arange(0, BLOCK_N)
        visible = real[:, None] & (slots >= 0)[None, :]
        if WINDOWED:
            visible &= position[:, None] - slots[None, :] < window
        total, best, summed = _attend_tile(
            query,
            total,
            best,
            summed,
            key_ptr,
            value_ptr,
            table_ptr,
            slots,
            context_end,
            visible,
            dims,
            key_stride_block,
            key_stride_slot,
            value_stride_block,
            value_stride_slot,
            scale,
            cap,
            PAGE,
            HEAD,
            CAPPED,
            FACTOR,
        )
    for tile in range(tl.maximum(low, base), high, BLOCK_N):
        slots = tile + tl.arange(0, BLOCK_N)
        node = slots - base
        word = tl.where((node < 64)[None, :], word_0[:, None], word_1[:, None])
        visible = ((word >> (node % 64).to(tl.int64)[None, :]) & 1) == 1
        if WINDOWED:
            depth = tl.load(rows_ptr + (first_row + node) * 2 + 1, mask=node < size, other=0)
            visible &= position[:, None] - (base + depth)[None, :] < window
        total, best, summed = _attend_tile(
            query,
            total,
            best,
            summed,
            key_ptr,
            value_ptr,
            table_ptr,
            slots,
            high,
            visible,
            dims,
            key_stride_block,
            key_stride_slot,
            value_stride_block,
            value_stride_slot,
            scale,
            cap,
            PAGE,
            HEAD,
            CAPPED,
            FACTOR,
        )

    unseen = summed == 0.0
    result = total / tl.where(unseen, 1.0, summed)[:, None]
    if KV_SCALED:
        result *= tl.load(value_scale_ptr)
    if splits == 1:
        at = (
            (start + row).to(tl.int64)[:, None] * out_stride_row
            + head[:, None] * out_stride_head
            + dims[None, :]
        )
        tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=stored)
    else:
        partial = (first_partial + split * size + row).to(tl.int64) * heads + head
        tl.store(partial_ptr + partial[:, None] * HEAD + dims[None, :], result, mask=stored)
        lse = tl.where(unseen, float("-inf"), best + tl.log2(tl.where(unseen, 1.0, summed)))
        tl.store(lse_ptr + partial, lse, mask=real)


@triton.jit
def combine_kernel(
    out_ptr,
    partial_ptr,
    lse_ptr,
    trees_ptr,
    rows_ptr,
    out_stride_row,
    out_stride_head,
    HEAD: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
):
    """Weigh the splits of one row and head by exp(log-sum-exp)."""
    index = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    record = trees_ptr + tl.load(rows_ptr + index * 2) * 8
    splits = tl.load(record + 7)
    if splits > 1:
        size = tl.load(record + 2)
        row = index - tl.load(record + 5)
        first_partial = tl.load(record + 6)
        dims = tl.arange(0, HEAD_PADDED)
        total = tl.zeros([HEAD_PADDED], dtype=tl.float32)
        best = tl.full([], float("-inf"), dtype=tl.float32)
        summed = tl.full([], 0.0, dtype=tl.float32)
        for split in range(splits):
            partial = (first_partial + split * size + row).to(tl.int64) * heads + head
            lse = tl.load(lse_ptr + partial)
            part = tl.load(partial_ptr + partial * HEAD + dims, mask=dims < HEAD, other=0.0)
            new_best = tl.maximum(best, lse)
            shift = tl.where(new_best == float("-inf"), 0.0, new_best)
            keep = tl.exp2(best - shift)
            weight = tl.exp2(lse - shift)
            total = total * keep + part * weight
            summed = summed * keep + weight
            best = new_best
        at = (
            (tl.load(record + 1) + row).to(tl.int64) * out_stride_row
            + head * out_stride_head
            + dims
        )
        tl.store(out_ptr + at, (total / summed).to(out_ptr.dtype.element_ty), mask=dims < HEAD)
