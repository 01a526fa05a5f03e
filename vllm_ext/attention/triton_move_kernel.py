# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel behind :mod:`vllm_ext.attention.triton_move`, where it is described."""

import triton
import triton.language as tl


# Nothing that changes from step to step may have the kernel compiled anew.
@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["moves_ptr", "starts_ptr"])
def move_kernel(
    pointers_ptr,
    slots_ptr,
    moves_ptr,
    starts_ptr,
    count,
    stride_block,
    stride_slot,
    stride_head,
    PAGE: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BITS: tl.constexpr,
):
    """One path in one layer and key head; see ``move_paths``."""
    path = tl.program_id(0)
    layer = tl.program_id(1)
    head = tl.program_id(2)
    keys = tl.load(pointers_ptr + layer * 2).to(tl.pointer_type(BITS))
    values = tl.load(pointers_ptr + layer * 2 + 1).to(tl.pointer_type(BITS))
    dims = head * stride_head + tl.arange(0, HEAD_PADDED)
    stored = tl.arange(0, HEAD_PADDED) < HEAD
    for move in range(tl.load(starts_ptr + path), tl.load(starts_ptr + path + 1)):
        source = tl.load(slots_ptr + tl.load(moves_ptr + move))
        target = tl.load(slots_ptr + tl.load(moves_ptr + count + move))
        of = (source // PAGE) * stride_block + (source % PAGE) * stride_slot + dims
        to = (target // PAGE) * stride_block + (target % PAGE) * stride_slot + dims
        key = tl.load(keys + of, mask=stored)
        value = tl.load(values + of, mask=stored)
        tl.store(keys + to, key, mask=stored)
        tl.store(values + to, value, mask=stored)
