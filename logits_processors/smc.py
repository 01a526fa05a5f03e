# SPDX-License-Identifier: Apache-2.0
"""Sequential Monte Carlo over constrained texts: weights, resampling, evidence (arXiv 2504.13139).

Only the arithmetic: which particles live on and what the weights say. Whoever drives an engine adds
each step's log weight, asks for resampling between steps, and re-submits the chosen particles;
:mod:`logits_processors.population` does so.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .law import logsumexp


def log_mean(log_weights: NDArray[np.float64]) -> float:
    """Return the log of the mean weight of ``float64[N]`` log weights."""
    return logsumexp(log_weights) - math.log(log_weights.size)


def effective_sample_size(log_weights: NDArray[np.float64]) -> float:
    """Return ``(sum w)^2 / sum w^2``, between 1 and N; 0 when every weight is 0."""
    total = logsumexp(log_weights)
    if total == -math.inf:
        return 0.0
    return math.exp(2.0 * total - logsumexp(2.0 * log_weights))


def normalized(log_weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the weights ``float64[N]`` scaled to sum to 1; all 0 when every weight is 0."""
    total = logsumexp(log_weights)
    if total == -math.inf:
        return np.zeros_like(log_weights)
    return np.exp(log_weights - total)


def systematic_resample(log_weights: NDArray[np.float64], uniform: float) -> NDArray[np.int64]:
    """Choose ancestors: particle ``i`` gets ``N w_i`` offspring on average, rounded up or down.

    Args:
        log_weights: ``float64[N]``, at least one above ``-inf``.
        uniform: the one random number needed, in [0, 1).

    Returns:
        ``int64[N]`` ancestor indices, ascending.

    Raises:
        ValueError: every weight is 0.
    """
    weights = normalized(log_weights)
    positive = np.flatnonzero(weights)
    if positive.size == 0:
        raise ValueError("every particle has weight 0; there is nothing to resample")
    count = log_weights.size
    points = (np.arange(count) + uniform) / count
    ladder = np.cumsum(weights[positive])
    # The last rung may round below 1 and must still catch the last point.
    rungs = np.minimum(np.searchsorted(ladder, points, "right"), positive.size - 1)
    ancestors: NDArray[np.int64] = positive[rungs]
    return ancestors


class Particles:
    """A weighted population and its running estimate of the constraint's probability.

    Args:
        count: number of particles N.
        ess_threshold: resample when the effective sample size falls below this share of N; 0 never.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, count: int, ess_threshold: float = 0.5) -> None:
        if count < 1:
            raise ValueError(f"count={count}: at least 1 particle is allowed")
        if not 0.0 <= ess_threshold <= 1.0:
            raise ValueError(f"ess_threshold={ess_threshold}: a share from 0 to 1 is allowed")
        self._ess_threshold = ess_threshold
        self._log_evidence = 0.0
        self.log_weights: NDArray[np.float64] = np.zeros(count)

    def reweight(self, log_increments: NDArray[np.float64]) -> None:
        """Multiply in the weights ``float64[N]`` of a step, potentials included.

        Raises:
            ValueError: another shape, NaN or ``+inf``.
        """
        if log_increments.shape != self.log_weights.shape:
            raise ValueError(
                f"log_increments has shape {log_increments.shape}, wanted {self.log_weights.shape}"
            )
        if np.isnan(log_increments).any() or (log_increments == np.inf).any():
            raise ValueError("log_increments holds NaN or +inf; weights are finite and from 0")
        self.log_weights = self.log_weights + log_increments

    @property
    def log_evidence(self) -> float:
        """Log of an unbiased estimate of the total mass; ``-inf`` when all particles died."""
        return self._log_evidence + log_mean(self.log_weights)

    @property
    def absolute_log_weights(self) -> NDArray[np.float64]:
        """Weights ``float64[N]`` that no resampling has scaled: their mean is the evidence."""
        return self._log_evidence + self.log_weights

    @property
    def ess(self) -> float:
        """Effective sample size of the current weights."""
        return effective_sample_size(self.log_weights)

    def resample(self, uniform: float) -> NDArray[np.int64] | None:
        """Resample if the effective sample size is too small.

        Args:
            uniform: random number in [0, 1).

        Returns:
            ``int64[N]`` ancestors, all weights then being 1; ``None`` when nothing was done, which
            is also the answer when every particle has died.
        """
        if not 0.0 < self.ess < self._ess_threshold * self.log_weights.size:
            return None
        ancestors = systematic_resample(self.log_weights, uniform)
        self._log_evidence += log_mean(self.log_weights)
        self.log_weights = np.zeros_like(self.log_weights)
        return ancestors
