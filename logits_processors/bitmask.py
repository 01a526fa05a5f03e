# SPDX-License-Identifier: Apache-2.0
"""Token bitmasks: which tokens may come next, one bit per token id.

The layout is the one that vLLM, xgrammar and llguidance share: an ``int32`` array of
``ceil(vocab_size / 32)`` words in which bit ``i % 32`` of word ``i // 32`` is token ``i``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Bitmask: TypeAlias = NDArray[np.int32]


def num_words(vocab_size: int) -> int:
    """Return how many ``int32`` words a mask over ``vocab_size`` tokens needs."""
    return (vocab_size + 31) // 32


def empty(vocab_size: int) -> Bitmask:
    """Return a mask ``int32[num_words(vocab_size)]`` that allows no token."""
    return np.zeros(num_words(vocab_size), dtype=np.int32)


def pack(tokens: Iterable[int], vocab_size: int) -> Bitmask:
    """Return the mask ``int32[num_words(vocab_size)]`` that allows exactly ``tokens``."""
    allowed = np.zeros(num_words(vocab_size) * 32, dtype=bool)
    allowed[np.fromiter(tokens, dtype=np.int64)] = True
    return np.packbits(allowed, bitorder="little").view(np.int32)


def unpack(mask: Bitmask, vocab_size: int) -> NDArray[np.bool_]:
    """Return ``bool[vocab_size]``: entry ``i`` tells whether ``mask`` allows token ``i``.

    Words that the mask lacks (logits padded beyond the tokenizer) read as forbidden.
    """
    bits = np.unpackbits(
        mask.view(np.uint8), count=min(vocab_size, mask.size * 32), bitorder="little"
    )
    allowed = bits.view(np.bool_)
    if allowed.size == vocab_size:
        return allowed
    padded = np.zeros(vocab_size, dtype=bool)
    padded[: allowed.size] = allowed
    return padded


def set_token(mask: Bitmask, token: int, allowed: bool) -> None:
    """Set or clear the bit of ``token`` in place."""
    word = mask[token // 32 : token // 32 + 1].view(np.uint32)
    bit = np.uint32(1 << (token % 32))
    word[0] = word[0] | bit if allowed else word[0] & ~bit
