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

_FIRST_CHUNK = 64
_CHUNK_GROWTH = 8


def uniforms(
    seed: int, position: int, count: int, *, attempt: int = 0, stream: int = 0
) -> NDArray[np.float64]:
    """Return ``float64[count]`` uniforms in the open interval (0, 1).

    Args:
        seed: any integer; its low 64 bits count.
        position: index of the output token that the noise is for, at least 0.
        count: how many.
        attempt: restarts of the same request use fresh noise.
        stream: independent noises within one step.
    """
    bits: NDArray[np.uint64] = np.random.Philox(
        counter=np.array([0, 0, attempt, stream], dtype=np.uint64),
        key=np.array([seed & 0xFFFFFFFFFFFFFFFF, position], dtype=np.uint64),
    ).random_raw(count)
    # The half step keeps both ends out, so that no logarithm below meets a zero.
    noise: NDArray[np.float64] = ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return noise


def arrival_times(
    log_probs: NDArray[np.float64], noise: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the logarithms of the arrival times, ``float64[V]``.

    Args:
        log_probs: ``float64[V]``, up to a constant; ``-inf`` never arrives (``+inf``).
        noise: ``float64[V]`` uniforms in (0, 1).
    """
    log_exponentials: NDArray[np.float64] = np.log(-np.log(noise))
    return log_exponentials - log_probs


def ascending(keys: NDArray[np.float64]) -> Iterator[int]:
    """Yield indices of the finite ``keys`` in order of ``(key, index)``.

    Sorting is lazy: most callers stop after a few of many thousand.
    """
    done, chunk = -np.inf, _FIRST_CHUNK
    while True:
        left = np.flatnonzero((keys > done) & (keys < np.inf))
        if left.size == 0:
            return
        if left.size > chunk:
            bound = np.partition(keys[left], chunk - 1)[chunk - 1]
            left = left[keys[left] <= bound]
        # flatnonzero is ascending and the sort stable: equal keys stay in index order.
        for index in left[np.argsort(keys[left], kind="stable")]:
            yield int(index)
        done = float(keys[left].max())
        chunk *= _CHUNK_GROWTH
