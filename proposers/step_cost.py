# SPDX-License-Identifier: Apache-2.0
"""How many drafted nodes pay, given how long a step takes as a function of its rows.

DySpec (arXiv 2410.11744) grows a tree by acceptance probability and leaves its size open. Here the
size maximises throughput: with c(rows) the latency of a step and p_1 >= p_2 >= ... the path
probabilities of the best nodes,

    n* = argmax_n (base_tokens + p_1 + ... + p_n) / c(base_rows + n)

and n* = 0 unless it beats the step without drafts by a margin.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from proposers.tree import TokenTree


class SizeSearch:
    """Finds the best number of nodes while they arrive best first; see `StepCost.search`.

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
        self._extra = 0.0
        self._tokens = base_tokens
        self._best = base_tokens / costs[0] * advantage
        # The last node of the best size brings at least what its row costs at the best rate.
        self.min_prob = self._best * min(
            (after - before for before, after in pairwise(costs)), default=0.0
        )

    def add(self, prob: float, extra: float = 0.0) -> None:
        """Take the next node, which costs `extra` seconds besides its row."""
        self._n += 1
        self._tokens += prob
        self._extra += extra
        rate = self._tokens / (self._costs[self._n] + self._extra)
        if rate > self._best:
            self._best, self.size = rate, self._n

    def hopeless(self, prob: float) -> bool:
        """Whether no size beyond the nodes taken can win if none of the rest exceeds `prob`."""
        # With all the rest at `prob` the gain is linear and the cost piecewise linear in the
        # number of nodes, and the present number does not win: if any does, a corner does.
        n, tokens, best, costs = self._n, self._tokens, self._best, self._costs
        for corner in self._corners:
            if corner > n and tokens + prob * (corner - n) > best * (costs[corner] + self._extra):
                return False
        return True


class StepCost(ABC):
    """Latency of a step by its number of scheduled tokens (rows): a curve through anchors.

    Args:
        anchors: row counts at which the curve bends, ascending.
        margin: how much better (relative) a step with drafts must promise to be than one without.

    Attributes:
        branching: seconds that a tree with branches costs besides its rows; a chain is verified by
            the engine's own attention.
    """

    branching = 0.0

    def __init__(self, anchors: NDArray[np.float64], margin: float) -> None:
        self._rows = anchors
        self._margin = margin

    def seconds(self, rows: int) -> float:
        """Expected latency of a step of `rows` rows, in seconds."""
        return float(self._at(np.array([rows], np.float64))[0])

    def seconds_with(self, base_rows: int, trees: Sequence[TokenTree]) -> float:
        """Expected latency of a step of `base_rows` rows and these trees, in seconds."""
        branching = sum(not tree.is_chain for tree in trees)
        return self.seconds(base_rows + sum(map(len, trees))) + self.branching * branching

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

    def gain(self, base_rows: int, trees: Sequence[TokenTree], spent: float = 0.0) -> float:
        """Relative gain of a step with drafts in the mean time that requests wait for a token.

        Tokens per second would let a few requests that are easy to guess pay for a step that takes
        longer for all. Requests that started together end with their slowest, which gains least.

        Args:
            base_rows: rows of the step without drafts.
            trees: of every request that decodes in it, possibly empty.
            spent: seconds that drafting them took beyond what this model knows of.
        """
        waits = sum(1.0 / (1.0 + sum(tree.probs)) for tree in trees) / len(trees)
        seconds = self.seconds_with(base_rows, trees) + spent
        return self.seconds(base_rows) / (seconds * waits) - 1.0

    def worth(self, base_rows: int, trees: Sequence[TokenTree], gain: float) -> float:
        """Seconds that drafting these trees may take for them to gain so much; see `gain`."""
        return self.seconds_with(base_rows, trees) * (
            (1.0 + self.gain(base_rows, trees)) / (1.0 + gain) - 1.0
        )

    def search(
        self, base_rows: int, base_tokens: float, limit: int, spent: float = 0.0
    ) -> SizeSearch:
        """The search that `best_size` makes, for nodes that come one by one; at most `limit`.

        `spent` seconds are gone whatever its outcome: they count for every size, none included.
        """
        costs = self.curve(base_rows + limit)[base_rows:] + spent
        inner = (self._rows > base_rows) & (self._rows < base_rows + limit)
        # The first node bends it too: drafting itself takes time.
        corners = sorted(
            {min(1, limit), *(self._rows[inner].astype(int) - base_rows).tolist(), limit}
        )
        return SizeSearch(costs.tolist(), corners, base_tokens, 1.0 + self._margin)

    @abstractmethod
    def _at(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Seconds by row count; linear between the anchors and beyond them."""
