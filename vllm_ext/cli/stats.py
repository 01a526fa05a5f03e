# SPDX-License-Identifier: Apache-2.0
"""Ratios with their spread, for paired measurements.

A group of prompts is measured on two arms in the same round, so whatever slows the machine down
for a while slows both. The ratio of a group is the median over its rounds (rounds of one group
are not independent evidence); the reported ratio is the median over groups, with a percentile
bootstrap interval over groups (Efron 1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 9999


@dataclass(frozen=True)
class Spread:
    """A median with the bounds of its 95% bootstrap interval; both equal it for one group."""

    median: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """The three numbers by name."""
        return asdict(self)


def median_ratio(baseline: Sequence[Sequence[float]], arm: Sequence[Sequence[float]]) -> Spread:
    """How many times faster `arm` is than `baseline`.

    Args:
        baseline: Seconds per token, one sequence per group with one value per round.
        arm: The same for the arm, with the same shape.

    Raises:
        ValueError: The shapes differ, there is no group, or a time is not positive.
    """
    if not baseline or [len(g) for g in baseline] != [len(g) for g in arm]:
        raise ValueError("baseline and arm need the same groups, at least one, and the same rounds")
    per_group = [
        float(np.median(np.asarray(b, dtype=float) / np.asarray(a, dtype=float)))
        for b, a in zip(baseline, arm, strict=True)
    ]
    if not all(math.isfinite(r) and r > 0 for r in per_group):
        raise ValueError("every time must be positive and finite")
    return spread_of_median(per_group)


def spread_of_median(values: Sequence[float]) -> Spread:
    """Median of `values` (at least one) with its bootstrap interval; the same for equal input."""
    from scipy.stats import bootstrap

    data = np.asarray(values, dtype=float)
    middle = float(np.median(data))
    if len(data) < 2:
        return Spread(middle, middle, middle)
    interval = bootstrap(
        (data,),
        np.median,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Spread(middle, float(interval.low), float(interval.high))


def quantiles_ms(seconds: Sequence[float]) -> dict[str, float | None]:
    """Median and 90th percentile of `seconds`, in milliseconds; None for no values."""
    if not seconds:
        return {"median": None, "p90": None}
    median, p90 = np.quantile(np.asarray(seconds, dtype=float) * 1e3, [0.5, 0.9])
    return {"median": float(median), "p90": float(p90)}
