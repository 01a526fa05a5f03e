# SPDX-License-Identifier: Apache-2.0
"""How far a sample is from the truth, and how far it would be if the sampler were perfect."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from methods import DEAD, Run
from numpy.typing import NDArray

from logits_processors.smc import effective_sample_size, normalized


def kl(truth: NDArray[np.float64], law: NDArray[np.float64]) -> float:
    """Return ``KL(truth || law)`` in nats."""
    seen = truth > 0
    return float((truth[seen] * np.log(truth[seen] / law[seen])).sum())


def smoothed(shares: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Return ``shares`` ``[..., K]`` of ``count`` samples with half a sample added to each cell.

    A text not drawn yet would make the divergence infinite.
    """
    cells: NDArray[np.float64] = (shares * count + 0.5) / (count + 0.5 * shares.shape[-1])
    return cells


def curve(
    truth: NDArray[np.float64], run: Run, counts: Sequence[int], weighted: bool
) -> list[float]:
    """Return ``KL(truth || estimate)`` of the first n samples, for each n of ``counts``."""
    return [kl(truth, smoothed(_shares(truth.size, run, n, weighted), n)) for n in counts]


def _shares(size: int, run: Run, count: int, weighted: bool) -> NDArray[np.float64]:
    texts = run.texts[:count]
    alive = texts != DEAD
    weights = normalized(np.where(alive, run.log_weights[:count] if weighted else 0.0, -np.inf))
    return np.bincount(texts[alive], weights[alive], minlength=size).astype(np.float64)


def noise_floor(
    truth: NDArray[np.float64], counts: Sequence[int], draws: int = 1000, share: float = 1.0
) -> dict[str, list[float]]:
    """Return mean, 5% and 95% point of the same divergence for samples of the truth itself.

    Args:
        truth: exact probabilities.
        counts: numbers of samples.
        draws: repetitions.
        share: the part of the samples that counts, for a weighted sampler its effective share: n
            samples with weights are then as good as ``n * share`` exact draws.
    """
    generator = np.random.default_rng(0)
    floor: dict[str, list[float]] = {"mean": [], "low": [], "high": []}
    for n in counts:
        effective = max(1, round(n * share))
        shares = generator.multinomial(effective, truth, size=draws) / effective
        values = np.array([kl(truth, law) for law in smoothed(shares, n)])
        floor["mean"].append(float(values.mean()))
        floor["low"].append(float(np.quantile(values, 0.05)))
        floor["high"].append(float(np.quantile(values, 0.95)))
    return floor


def weight_summary(runs: Sequence[Run]) -> dict[str, float]:
    """Return the mean weight, its standard error, and the effective share of samples.

    The error is taken over blocks of 16, because the particles of one population share their fate.
    """
    weights = np.exp(np.concatenate([run.log_weights for run in runs]))
    blocks = weights[: weights.size // 16 * 16].reshape(-1, 16).mean(axis=1)
    log_weights = np.concatenate([run.log_weights for run in runs])
    return {
        "mean_weight": float(weights.mean()),
        "standard_error": float(blocks.std(ddof=1) / np.sqrt(blocks.size)),
        "ess_share": effective_sample_size(log_weights) / weights.size,
    }
