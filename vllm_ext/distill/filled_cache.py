# SPDX-License-Identifier: Apache-2.0
"""A cache of keys and values for rows whose final length is known.

transformers' growing cache copies everything for each new token, which took a third of the target's
time here; its static one attends to all places from the beginning. This one has room for all of
them and shows those that are filled.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def filled_cache(config: Any, length: int) -> DynamicCache:
    """An empty cache for at most `length` tokens per row.

    Layers that see a window, or keep something else than keys and values, have transformers' own.
    """
    cache = DynamicCache(config=config)
    cache.layers = [
        FilledLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


class FilledLayer(DynamicLayer):
    """Keys and values of one layer, [rows, heads, tokens so far, head size] each."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length
        self._room: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add those of new tokens.

        Args:
            key_states: [rows, heads, new tokens, head size].
            value_states: likewise.
            args: not used, as in transformers' layer.
            kwargs: likewise.

        Returns:
            All keys and all values so far; views that the next call leaves as they are.

        Raises:
            ValueError: if there is no room for them.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room = [
                new.new_empty(*new.shape[:2], self._length, new.shape[3])
                for new in (key_states, value_states)
            ]
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        if end > self._length:
            raise ValueError(f"a cache for {self._length} tokens was given {end}")
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, begin:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self._room)
        return self.keys, self.values
