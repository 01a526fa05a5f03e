# SPDX-License-Identifier: Apache-2.0
"""The random decisions of drafting and verification, behind one small interface.

Sampled drafts are exact only as a *pair* of algorithms, the one that draws and the one that
verifies. Both make every random decision through a `Chance`. `Dice` decides by uniform numbers; the
tests pass one that follows every branch with its probability, so the law that they compute is that
of the code which runs, not of a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Chance(Protocol):
    """A source of random decisions, independent of each other."""

    def accept(self, probability: float) -> bool:
        """True with `probability`, which is at least 0; 1 or more is certain."""

    def draw(self, weights: NDArray[np.float64]) -> int:
        """An index with probability proportional to `weights`.

        Args:
            weights: float64 [V], not negative, with a positive sum.
        """

    def uniform(self) -> float:
        """A number in [0, 1)."""


class Dice:
    """Decides by uniform numbers, one per decision that is not certain.

    Args:
        uniform: returns the next number in [0, 1), with 53 random bits; `random` of NumPy's
            generators does. Drafting and verification must not share numbers: what was drafted
            has to be independent of the decisions about it.
    """

    def __init__(self, uniform: Callable[[], float]) -> None:
        self._uniform = uniform

    def accept(self, probability: float) -> bool:
        """See `Chance.accept`."""
        return probability >= 1.0 or self._uniform() < probability

    def draw(self, weights: NDArray[np.float64]) -> int:
        """See `Chance.draw`.

        Raises:
            ValueError: if the weights have no positive, finite sum.
        """
        sums = np.cumsum(weights)
        total = float(sums[-1])
        if not 0.0 < total < np.inf:
            raise ValueError(f"Dice.draw: weights sum to {total}; the sum must be positive")
        # Indices of weight 0 repeat the sum before them, so they are never the first to exceed it.
        index = int(np.searchsorted(sums, self._uniform() * total, side="right"))
        if index == len(sums):  # the product was rounded up to the total
            index = int(np.searchsorted(sums, total))
        return index

    def uniform(self) -> float:
        """See `Chance.uniform`."""
        return self._uniform()


def request_dice(seed: int, position: int, stream: int) -> Dice:
    """Dice that fall the same way whenever a request comes to the same place.

    The numbers are a function of the arguments (Philox), so a request decides alike alone, in a
    batch and after preemption.

    Args:
        seed: of the request; its low 64 bits count.
        position: number of output tokens before the step, at least 0.
        stream: tells drafting from verification, which must not share numbers; 0 to 2^64 - 1.
    """
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, position], np.uint64)
    counter = np.array([0, 0, 0, stream], np.uint64)
    return Dice(np.random.Generator(np.random.Philox(counter=counter, key=key)).random)
