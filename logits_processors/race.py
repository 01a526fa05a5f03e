# SPDX-License-Identifier: Apache-2.0
"""Sampling without replacement by an exponential race.

Token ``i`` arrives at time ``E_i / p_i`` with independent ``E_i ~ Exp(1)``. The order of arrival is
a draw without replacement from ``p``, and its first token a draw from ``p`` (the Gumbel-top-k trick
of arXiv 1903.06059 with the sign turned). Near ties apart, a small change of the logits leaves the
order alone, which inverting the cumulative distribution does not offer.

Noise comes from the counter-based Philox generator keyed by ``(seed, position)``. It has no state,
so a request draws the same tokens alone, in a batch, after preemption and under speculation.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .vectors import log_

_FIRST_CHUNK = 64
_CHUNK_GROWTH = 8


def uniforms(
    seed: int, position: int, count: int, *, attempt: int = 0, stream: int = 0
) -> NDArray[np.float64]:
    """Return ``float64[count]`` uniforms in the open interval (0, 1); arguments as below."""
    bits: NDArray[np.uint64] = _philox(seed, position, attempt, stream).random_raw(count)
    # The half step keeps both ends out, so that no logarithm meets a zero.
    noise: NDArray[np.float64] = ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return noise


def log_exponentials(
    seed: int, position: int, count: int, *, attempt: int = 0, stream: int = 0
) -> NDArray[np.float64]:
    """Return the logarithms ``float64[count]`` of independent draws from ``Exp(1)``.

    Args:
        seed: any integer; its low 64 bits count.
        position: index of the output token that the noise is for, at least 0.
        count: how many.
        attempt: restarts of the same request use fresh noise.
        stream: independent noises within one step.
    """
    philox = _philox(seed, position, attempt, stream)
    return log_(np.random.Generator(philox).standard_exponential(count))


def _philox(seed: int, position: int, attempt: int, stream: int) -> np.random.Philox:
    return np.random.Philox(
        counter=np.array([0, 0, attempt, stream], dtype=np.uint64),
        key=np.array([seed & 0xFFFFFFFFFFFFFFFF, position], dtype=np.uint64),
    )


def arrival_times(
    log_probs: NDArray[np.float64], noise: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the logarithms of the arrival times, ``float64[V]``.

    Args:
        log_probs: ``float64[V]``, up to a constant; ``-inf`` never arrives (``+inf``).
        noise: ``float64[V]``, of :func:`log_exponentials`.
    """
    return noise - log_probs


def ascending(keys: NDArray[np.float64]) -> Iterator[int]:
    """Yield indices of the finite ``keys`` in order of ``(key, index)``.

    Sorting is lazy, in growing chunks: most callers stop after one or two of many thousand.
    """
    left = keys.copy()
    found = (
        np.argmin(left, keepdims=True) if np.min(left, initial=np.inf) < np.inf else np.array([])
    )
    chunk = _FIRST_CHUNK
    while found.size:
        yield from found.tolist()
        left[found] = np.inf
        last = min(chunk, left.size) - 1
        bound = np.partition(left, last)[last]
        found = np.flatnonzero((left <= bound) & (left < np.inf))
        # flatnonzero is ascending and the sort stable: equal keys stay in index order.
        found = found[np.argsort(left[found], kind="stable")]
        chunk *= _CHUNK_GROWTH
