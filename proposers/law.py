# SPDX-License-Identifier: Apache-2.0
"""Laws of the next token: the target's over the vocabulary, a draft's over the tokens it can draw.

A draft's law may be any law, as long as it is the one that was drawn from. So it may be cut to the
K most probable tokens and renormalised, and then a tree keeps K numbers per node instead of as many
as there are tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Law: TypeAlias = NDArray[np.float64]
"""float64 [vocab]: probabilities that sum to 1."""

Row: TypeAlias = NDArray[np.floating[Any]]
"""[vocab] of any floating type: probabilities up to rounding, which `normalised` removes."""


def normalised(row: Row) -> Law:
    """The row in float64, divided by its sum.

    Raises:
        ValueError: if an entry is negative or the sum is not positive and finite.
    """
    law = np.asarray(row, np.float64)
    total = float(law.sum())
    if not 0.0 < total < np.inf or law.min() < 0.0:
        raise ValueError(
            f"normalised: a row with minimum {law.min()} and sum {total} is no law; "
            "give probabilities"
        )
    return law / total


@dataclass(frozen=True, slots=True, eq=False)
class DraftLaw:
    """What the children of a node are drawn from.

    Attributes:
        tokens: int64 [K], distinct.
        probs: float64 [K], positive, summing to 1.
    """

    tokens: NDArray[np.int64]
    probs: Law

    @classmethod
    def of(cls, tokens: NDArray[np.integer[Any]], weights: Row) -> DraftLaw:
        """The law of K tokens with these weights; those of weight 0 are left out.

        Args:
            tokens: [K], distinct.
            weights: [K], not negative, with a positive sum, such as the K largest of a softmax.

        Raises:
            ValueError: see `normalised`.
        """
        probs = normalised(weights)
        possible = np.flatnonzero(probs)
        return cls(np.asarray(tokens, np.int64)[possible], probs[possible])

    @classmethod
    def dense(cls, row: Row) -> DraftLaw:
        """The law of a row over the whole vocabulary."""
        return cls.of(np.arange(len(row)), row)

    def place(self, token: int) -> int:
        """Index of a token.

        Raises:
            ValueError: if the token cannot be drawn.
        """
        places = np.flatnonzero(self.tokens == token)
        if not len(places):
            raise ValueError(
                f"DraftLaw: token {token} has draft probability 0; only tokens drawn from this law "
                "can be verified with it"
            )
        return int(places[0])
