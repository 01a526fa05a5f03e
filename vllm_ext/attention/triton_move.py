# SPDX-License-Identifier: Apache-2.0
"""Accepted nodes move to the slots of their positions, in the caches of many layers at once.

Writing them anew costs two copies per layer in every step, made before anybody knows what will be
accepted, and three launches per layer after it. Here one launch does all layers of a kind, bit by
bit whatever the dtype.

A path's nodes never lie before their places, t_1 < t_2 < ... and t_i <= s_i < s_(i+1), so in the
order of the path no slot is overwritten before it is read: t_i < s_j for all j > i. One program
moves one path, and the same thread reads and writes an element of a row, so no other order is seen.

Needs torch and Triton only. Under ``TRITON_INTERPRET=1`` it runs on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_ext.attention.triton_move_kernel import move_kernel

_BITS = {1: tl.int8, 2: tl.int16, 4: tl.int32}
"""By bytes of an element."""


@dataclass(frozen=True, slots=True)
class Caches:
    """Keys and values of layers whose caches differ in nothing but where they lie.

    Attributes:
        like: keys of one of them, [blocks, page, kv_heads, head_size].
        pointers: int64 [layers, 2], addresses of keys and of values.
    """

    like: torch.Tensor
    pointers: torch.Tensor

    @classmethod
    def of(cls, views: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Caches:
        """Collect layers.

        Args:
            views: keys and values of each, [blocks, page, kv_heads, head_size], last stride 1.

        Raises:
            ValueError: if two of them differ in shape, strides or dtype, or one has a last stride
                that is not 1, or elements of another size than 1, 2 or 4 bytes.
        """
        like = views[0][0]
        if like.stride(-1) != 1 or like.element_size() not in _BITS:
            raise ValueError(f"caches of {like.dtype} with strides {like.stride()}")
        for view in (view for pair in views for view in pair):
            if (view.shape, view.stride(), view.dtype) != (like.shape, like.stride(), like.dtype):
                raise ValueError("the layers' caches differ in shape, strides or dtype")
        addresses = [[keys.data_ptr(), values.data_ptr()] for keys, values in views]
        return cls(like, torch.tensor(addresses, dtype=torch.int64, device=like.device))


def move_paths(
    caches: Caches, slots: torch.Tensor, moves: torch.Tensor, starts: torch.Tensor
) -> None:
    """Move rows of the batch to the slots of other rows, in every layer.

    Args:
        caches: of the layers.
        slots: int64 [rows], slot of each row of the batch.
        moves: int64 [2, M], which row goes where; those of one path together, in its order.
        starts: int64 [paths + 1], where each path's moves begin.
    """
    like = caches.like
    page, kv_heads, head_size = like.shape[1:]
    move_kernel[(len(starts) - 1, len(caches.pointers), kv_heads)](
        caches.pointers,
        slots,
        moves,
        starts,
        moves.shape[1],
        *like.stride()[:3],
        PAGE=page,
        HEAD=head_size,
        HEAD_PADDED=triton.next_power_of_2(head_size),
        BITS=_BITS[like.element_size()],
        num_warps=1,
    )
