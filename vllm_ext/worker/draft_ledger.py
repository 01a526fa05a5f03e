# SPDX-License-Identifier: Apache-2.0
"""Which KV blocks hold a draft model's keys and values of which text.

The draft model shares the target's block tables, but not every step runs it. vLLM's prefix cache
hands out blocks because the *target* computed them; the draft's half of such a block may be missing
or belong to another text. So a block that the draft model has filled is marked with a hash of the
whole text up to its end, and a request may rely on the leading blocks whose marks agree with its
own text. Nothing depends on when vLLM frees, reuses or evicts a block: a mark is true until the
draft model, the only writer of these layers, writes into the block again.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


class DraftLedger:
    """Marks of the blocks of one KV cache.

    Args:
        block_size: slots of a block.

    Raises:
        ValueError: for a block of no slots.
    """

    def __init__(self, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"DraftLedger: block_size={block_size}; it must be at least 1")
        self._size = block_size
        self._marks: dict[int, int] = {}

    def valid(self, tokens: NDArray[np.int32], blocks: NDArray[np.int32]) -> int:
        """How many leading tokens of a text have valid keys and values; a multiple of a block.

        Args:
            tokens: int32 [n], the text.
            blocks: int32 [>= n / block_size], its blocks.
        """
        count = 0
        for block, mark in zip(blocks.tolist(), self._hashes(tokens), strict=False):
            if self._marks.get(block) != mark:
                break
            count += self._size
        return count

    def wrote(
        self, tokens: NDArray[np.int32], blocks: NDArray[np.int32], start: int, end: int
    ) -> None:
        """The model has computed positions [start, end) of a text, all before them being valid.

        Args:
            tokens: int32 [>= end], the text.
            blocks: its blocks.
            start: first position that was written.
            end: one past the last one.
        """
        self.scribbled(blocks, start, end)
        first, full = start // self._size, end // self._size
        if first == full:
            return  # most steps fill no block, and hashing goes over the whole text
        for at, mark in enumerate(self._hashes(tokens[: full * self._size])):
            if at >= first:
                self._marks[int(blocks[at])] = mark

    def scribbled(self, blocks: NDArray[np.int32], start: int, end: int) -> None:
        """Positions [start, end) were written with something that is no text."""
        for at in range(start // self._size, -(-end // self._size)):
            self._marks.pop(int(blocks[at]), None)

    def forget(self, blocks: Iterable[int]) -> None:
        """Somebody else has written into these blocks."""
        for block in blocks:
            self._marks.pop(block, None)

    def _hashes(self, tokens: NDArray[np.int32]) -> Iterable[int]:
        """Of the text up to the end of each full block."""
        mark = 0
        for begin in range(0, len(tokens) - self._size + 1, self._size):
            mark = hash((mark, tokens[begin : begin + self._size].tobytes()))
            yield mark
