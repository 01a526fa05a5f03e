# SPDX-License-Identifier: Apache-2.0
"""Keys and values moved within the CPU cache, compiled by Numba."""

from __future__ import annotations

from typing import Any

from vllm_ext.compiled import compiled


@compiled
def move_slots(
    cache: Any, keys: Any, values: Any, block_size: int, sources: Any, targets: Any
) -> None:
    """Copy the keys and values of slots to other slots, one slot after the other.

    Args:
        cache: [blocks, kv_heads, 2, block_size * head_size], as `cpu.cache_bits` gives it; written.
        keys: int64 [block_size * head_size], as in `layout.CacheLayout`.
        values: as `keys`.
        block_size: slots of a block.
        sources: int64 [n], slots.
        targets: int64 [n], slots.
    """
    head_size = len(keys) // block_size
    for move in range(len(sources)):
        source, target = sources[move], targets[move]
        of, to = source % block_size * head_size, target % block_size * head_size
        for head in range(cache.shape[1]):
            read, written = cache[source // block_size, head], cache[target // block_size, head]
            for d in range(head_size):
                written[0, keys[to + d]] = read[0, keys[of + d]]
                written[1, values[to + d]] = read[1, values[of + d]]
