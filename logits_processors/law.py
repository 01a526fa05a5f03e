# SPDX-License-Identifier: Apache-2.0
"""The user's sampling law: what temperature, top-k and top-p make of a row of logits.

Constrained sampling is exact or biased relative to *this* law, so it is computed here, before any
constraint, in the order and with the ties of vLLM's own sampler: temperature, top-k, top-p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .vectors import exp_

_NUCLEUS_GUESS = 512


def logsumexp(values: NDArray[np.float64]) -> float:
    """Return ``log(sum(exp(values)))``; ``-inf`` for no mass, the largest value if not finite."""
    top = float(values.max(initial=-np.inf))
    if not math.isfinite(top):
        return top
    return top + math.log(exp_(values - top).sum())


@dataclass(frozen=True)
class SamplingLaw:
    """Sampling parameters that shape a distribution.

    Args:
        temperature: 0 means greedy.
        top_k: keep the ``top_k`` most probable tokens and their ties; 0 keeps all.
        top_p: keep the fewest most probable tokens whose mass reaches ``top_p``.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < np.inf:
            raise ValueError(f"temperature={self.temperature}: a finite number from 0 is allowed")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: 0 (keep all) or a positive number is allowed")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p}: a number above 0 and up to 1 is allowed")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken instead of a draw."""
        return self.temperature == 0.0

    def log_probs(self, logits: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the normalised log law ``float64[V]`` of ``logits`` ``[V]``.

        Raises:
            ValueError: the law is greedy, or no logit is finite.
        """
        if self.greedy:
            raise ValueError("temperature 0 has no sampling law; take the argmax")
        scores = logits.astype(np.float64) / self.temperature
        total = logsumexp(scores)
        if not np.isfinite(total):
            raise ValueError("logits hold no finite value, or +inf or NaN: no law to sample from")
        scores -= total
        if 0 < self.top_k < scores.size:
            threshold = np.partition(scores, -self.top_k)[-self.top_k]
            scores[scores < threshold] = -np.inf
            scores -= logsumexp(scores)
        if self.top_p < 1.0:
            scores = _nucleus(scores, self.top_p)
            scores -= logsumexp(scores)
        return scores


def _nucleus(scores: NDArray[np.float64], top_p: float) -> NDArray[np.float64]:
    """Return ``scores`` with ``-inf`` outside the smallest set that holds ``top_p``."""
    candidates = np.arange(scores.size)
    if scores.size > _NUCLEUS_GUESS:
        # Sorting the whole vocabulary costs more than all the rest; few tokens usually suffice.
        bound = np.partition(scores, -_NUCLEUS_GUESS)[-_NUCLEUS_GUESS]
        guess = np.flatnonzero(scores >= bound)
        if np.exp(scores[guess]).sum() >= top_p:
            candidates = guess
    order = candidates[np.argsort(-scores[candidates], kind="stable")]
    mass = np.exp(scores[order])
    inside = order[np.cumsum(mass) - mass < top_p]
    kept = np.full_like(scores, -np.inf)
    kept[inside] = scores[inside]
    return kept
