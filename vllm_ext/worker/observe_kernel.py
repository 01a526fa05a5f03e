# SPDX-License-Identifier: Apache-2.0
"""`observe.top_candidates` in two passes over the logits, compiled by Numba, on one core."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_ext.compiled import LOWEST, ZERO, compiled, copy_bits, exponentiate, highest_of

CHUNK = 64
_NOTHING = np.float32(-np.inf)  # a grammar's mask


@compiled
def top_rows(logits: Any, stride: int, ids: Any, probs: Any) -> None:
    """Most likely tokens of each row, most likely first, and their estimated probabilities.

    The normaliser is the sum of the best and, of all other tokens, of every `stride`-th one,
    times `stride`. Where fewer than k are possible, the rest is token 0 with probability 0.

    Args:
        logits: [rows, vocab], the bits of float32 (uint32) or bfloat16 (uint16).
        stride: see above; the first token counted is 0.
        ids: int64 [rows, k], written; k at most CHUNK and at most the vocabulary.
        probs: float32 [rows, k], written.
    """
    rows, vocab = logits.shape
    k = ids.shape[1]
    chunks = (vocab + CHUNK - 1) // CHUNK
    bits = np.empty(CHUNK, np.uint32)
    chunk = bits.view(np.float32)
    peaks = np.empty(chunks, np.float32)
    values = np.empty(k, np.float32)
    taken = np.empty((vocab + stride - 1) // stride, np.uint32)
    sampled = taken.view(np.float32)
    for row in range(rows):
        line = logits[row]
        for c in range(chunks):
            n = min(CHUNK, vocab - c * CHUNK)
            chunk[:] = _NOTHING
            copy_bits(bits, 0, 0, line, c * CHUNK, 0, 1, n)
            peaks[c] = highest_of(chunk, 0, CHUNK)
        # The k best tokens lie in the k chunks with the highest peaks.
        found = 0
        for _ in range(min(k, chunks)):
            c = int(np.argmax(peaks))
            if peaks[c] == _NOTHING or (found == k and peaks[c] <= values[k - 1]):
                break
            peaks[c] = _NOTHING
            n = min(CHUNK, vocab - c * CHUNK)
            copy_bits(bits, 0, 0, line, c * CHUNK, 0, 1, n)
            for j in range(n):
                if found == k and chunk[j] <= values[k - 1]:
                    continue
                place = min(found, k - 1)
                while place > 0 and values[place - 1] < chunk[j]:
                    values[place], ids[row, place] = values[place - 1], ids[row, place - 1]
                    place -= 1
                values[place], ids[row, place] = chunk[j], c * CHUNK + j
                found = min(found + 1, k)
        values[found:] = _NOTHING
        ids[row, found:] = 0
        best = values[0]
        copy_bits(taken, 0, 1, line, 0, stride, len(taken), 1)
        total = np.float32(stride) * exponentiate(sampled, 0, len(sampled), best)
        for j in range(k):
            probs[row, j] = np.exp(values[j] - best) if values[j] - best > LOWEST else ZERO
            if ids[row, j] % stride == 0:
                total -= np.float32(stride) * probs[row, j]
        total = max(total, ZERO)
        for j in range(k):
            total += probs[row, j]
        for j in range(k):
            probs[row, j] /= total
