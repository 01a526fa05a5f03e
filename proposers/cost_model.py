# SPDX-License-Identifier: Apache-2.0
"""How long a step takes as a function of its rows, and how many drafted rows therefore pay.

DySpec (arXiv 2410.11744) grows a tree by acceptance probability and leaves its size open. Here the
size maximises throughput: with c(rows) the latency of a step and p_1 >= p_2 >= ... the path
probabilities of the best nodes,

    n* = argmax_n (base_tokens + p_1 + ... + p_n) / c(base_rows + n)

and n* = 0 unless it beats the step without drafts by a margin. c is a curve through anchor row
counts, measured at start-up and corrected by every step that runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_CLIP = 0.3
"""Largest log-ratio that one step may report: a pause of the machine is not a cost of rows."""

_RATE_SHARED = 0.02
_RATE_ANCHOR = 0.05
"""Step sizes for drift that all row counts share (context length, load) and for one anchor's.

The second is the larger one, so that a wrong belief corrects itself: if steps of the size in use
turn out slow, sizes that are not in use must look better by comparison, or none would be tried.
"""


class SizeSearch:
    """Finds the best number of nodes while they arrive best first; see `CostModel.search`.

    Attributes:
        size: the best number so far.
        min_prob: no node below it can be the last one of a best size.
    """

    def __init__(
        self, costs: list[float], corners: list[int], base_tokens: float, advantage: float
    ) -> None:
        """Seconds by number of nodes (piecewise linear, bent at `corners`, which ends with the
        last index), and the factor by which nodes must beat none.
        """
        self.size = 0
        self._costs = costs
        self._corners = corners
        self._n = 0
        self._tokens = base_tokens
        self._best = base_tokens / costs[0] * advantage
        # The last node of the best size brings at least what its row costs at the best rate.
        self.min_prob = self._best * min(
            (after - before for before, after in pairwise(costs)), default=0.0
        )

    def add(self, prob: float) -> None:
        """Take the next node."""
        self._n += 1
        self._tokens += prob
        rate = self._tokens / self._costs[self._n]
        if rate > self._best:
            self._best, self.size = rate, self._n

    def hopeless(self, prob: float) -> bool:
        """Whether no size beyond the nodes taken can win if none of the rest exceeds `prob`."""
        # With all the rest at `prob` the gain is linear and the cost piecewise linear in the
        # number of nodes, and the present number does not win: if any does, a corner does.
        n, tokens, best, costs = self._n, self._tokens, self._best, self._costs
        for corner in self._corners:
            if corner > n and tokens + prob * (corner - n) > best * costs[corner]:
                return False
        return True


class CostModel:
    """Latency of a step by its number of scheduled tokens (rows).

    Measured times differ between the ranks of a tensor-parallel group, while their drafts must
    not: there, one rank measures and all of them `record` what it measured.

    Args:
        prior: pairs (rows, seconds) from a start-up measurement; rows distinct and at least 1.
        margin: how much better (relative) a step with drafts must promise to be than one without.

    Raises:
        ValueError: if `prior` is empty, has a non-positive entry or repeats a row count.
    """

    def __init__(self, prior: Sequence[tuple[int, float]], *, margin: float = 0.02) -> None:
        points = sorted(prior)
        rows = [r for r, _ in points]
        if not points or len(set(rows)) != len(rows):
            raise ValueError(
                f"CostModel: prior={list(prior)}; give at least one (rows, seconds) pair and each "
                "row count once"
            )
        if rows[0] < 1 or not all(s > 0 and math.isfinite(s) for _, s in points):
            raise ValueError(
                f"CostModel: prior={list(prior)}; rows must be at least 1 and seconds positive"
            )
        if margin < 0:
            raise ValueError(f"CostModel: margin={margin}; it must not be negative")
        self._rows = np.array(rows, np.float64)
        self._log_seconds = np.log(np.array([s for _, s in points], np.float64))
        self._margin = margin

    def record(self, rows: int, seconds: float) -> None:
        """Correct the curve by one step of `rows` rows that took `seconds`.

        Values that can't be a measurement (not positive, not finite) are ignored.
        """
        if rows < 1 or not seconds > 0.0 or not math.isfinite(seconds):
            return
        surprise = math.log(seconds / self.seconds(rows))
        surprise = min(max(surprise, -_CLIP), _CLIP)
        self._log_seconds += _RATE_SHARED * surprise
        right = int(np.searchsorted(self._rows, rows))
        right = min(right, len(self._rows) - 1)
        left = max(right - 1, 0) if self._rows[right] > rows else right
        span = self._rows[right] - self._rows[left]
        share = (rows - self._rows[left]) / span if span > 0 else 1.0
        self._log_seconds[right] += _RATE_ANCHOR * share * surprise
        if left != right:
            self._log_seconds[left] += _RATE_ANCHOR * (1.0 - share) * surprise

    def seconds(self, rows: int) -> float:
        """Expected latency of a step of `rows` rows, in seconds."""
        return float(self._at(np.array([rows], np.float64))[0])

    def curve(self, max_rows: int) -> NDArray[np.float64]:
        """float64 [max_rows + 1]: expected seconds by row count, non-decreasing.

        Entry 0 equals entry 1: a step has at least one row.
        """
        return self._at(np.arange(max_rows + 1, dtype=np.float64))

    def best_size(self, base_rows: int, base_tokens: float, sorted_probs: Sequence[float]) -> int:
        """How many of the best nodes to add to a step.

        Args:
            base_rows: rows of the step without drafts.
            base_tokens: tokens that those rows yield.
            sorted_probs: path probabilities of the nodes, best first.

        Returns:
            The number of nodes with the highest expected tokens per second, 0 unless it is better
            than no nodes by the margin; the smallest such number on a tie.
        """
        search = self.search(base_rows, base_tokens, len(sorted_probs))
        for prob in sorted_probs:
            search.add(prob)
        return search.size

    def gain(
        self,
        base_rows: int,
        base_tokens: float,
        nodes: int,
        extra_tokens: float,
        spent: float = 0.0,
    ) -> float:
        """Relative gain in tokens per second from `nodes` nodes that bring `extra_tokens` and took
        `spent` seconds to draft.
        """
        slower = (self.seconds(base_rows + nodes) + spent) / self.seconds(base_rows)
        return (base_tokens + extra_tokens) / base_tokens / slower - 1.0

    def search(
        self, base_rows: int, base_tokens: float, limit: int, spent: float = 0.0
    ) -> SizeSearch:
        """The search that `best_size` makes, for nodes that come one by one; at most `limit`.

        `spent` seconds are gone whatever its outcome: they count for every size, none included.
        """
        costs = self.curve(base_rows + limit)[base_rows:] + spent
        inner = (self._rows > base_rows) & (self._rows < base_rows + limit)
        corners = [*(self._rows[inner].astype(int) - base_rows).tolist(), limit]
        return SizeSearch(costs.tolist(), corners, base_tokens, 1.0 + self._margin)

    def _at(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        anchors = np.maximum.accumulate(np.exp(self._log_seconds))
        seconds: NDArray[np.float64] = np.interp(rows, self._rows, anchors)
        if len(anchors) > 1:
            # Beyond the last anchor the curve goes on with the mean slope of the measured range.
            slope = (anchors[-1] - anchors[0]) / (self._rows[-1] - self._rows[0])
            seconds += slope * np.maximum(rows - self._rows[-1], 0.0)
        return seconds
