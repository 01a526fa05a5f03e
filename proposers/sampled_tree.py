# SPDX-License-Identifier: Apache-2.0
"""A tree of tokens that were *drawn* from a draft model, with all that verification needs.

The rules of `verify_swor`, `verify_kseq` and `verify_block` compare the target's law with the law
that a token was drawn from, so a drafted token is not enough: the tree keeps, for each expanded
node, that law and every draw in its order. Two things follow for whoever grows such a tree.

* Whether to draw once more may depend only on what is known before the draw. A draw that was made
  is never dropped or moved because of the token that came out.
* A node's target row may be left out, as schedulers do that cut a draft: an accepted node without a
  row is the last token of its step. The choice may look at the node's token, but not at draws below
  it.

Growers are generators which yield the nodes whose draft laws they want next and are sent one row
for each, so that `grow` needs one forward of the draft model per level of a whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from proposers.chance import Chance
from proposers.tree import ROOT, TokenTree

Law: TypeAlias = NDArray[np.float64]
"""float64 [vocab]: probabilities that sum to 1."""

Row: TypeAlias = NDArray[np.floating[Any]]
"""[vocab] of any floating type: probabilities up to rounding, which `normalised` removes."""

LevelwiseGrowth: TypeAlias = Generator[Sequence[int], Sequence[Row], None]
"""A tree in the making: yields nodes, is sent their draft rows."""

Distributions: TypeAlias = Callable[[Sequence[tuple[int, int]]], Sequence[Row]]
"""Draft rows for pairs (index of the tree in the batch, node); one forward of the model."""


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


class SampledTree:
    """Nodes by the order in which they were first drawn; a parent comes before its children.

    Attributes:
        tokens: N token ids.
        parents: N parents, ``ROOT`` for the children of the root.
        values: N estimates of the probability that the path is accepted: the draft's own
            probability of the path (DySpec, arXiv 2410.11744).
        laws: by expanded node (``ROOT`` is one), the law that its children were drawn from.
        draws: by expanded node, its children in the order drawn; a child that was drawn again
            (with replacement) appears again.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.values: list[float] = []
        self.laws: dict[int, Law] = {}
        self.draws: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def value(self, node: int) -> float:
        """The node's value; 1 for the root."""
        return 1.0 if node == ROOT else self.values[node]

    def expand(self, node: int, row: Row) -> None:
        """Set the law of the children of `node`, before the first of them is drawn."""
        self.laws[node] = normalised(row)
        self.draws[node] = []

    def rest(self, node: int) -> float:
        """Probability that the law of `node` gives to tokens not drawn there yet, about 0 at the
        end of its support.
        """
        law = self.laws[node]
        drawn = {self.tokens[child] for child in self.draws[node]}
        return max(0.0, 1.0 - sum(float(law[token]) for token in drawn))

    def draw_new(self, node: int, chance: Chance) -> int | None:
        """Draw a child without replacement; ``None`` where every possible token was drawn."""
        weights = self.laws[node].copy()
        weights[[self.tokens[child] for child in self.draws[node]]] = 0.0
        if not weights.any():
            return None
        return self._add(node, chance.draw(weights))

    def draw(self, node: int, chance: Chance) -> int:
        """Draw a child with replacement; a token drawn before leads to the same child."""
        token = chance.draw(self.laws[node])
        for child in self.draws[node]:
            if self.tokens[child] == token:
                self.draws[node].append(child)
                return child
        return self._add(node, token)

    def token_tree(self) -> TokenTree:
        """The nodes as the engine schedules them; any prefix may be given target rows."""
        return TokenTree(tuple(self.tokens), tuple(self.parents), tuple(self.values))

    def _add(self, node: int, token: int) -> int:
        child = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(node)
        self.values.append(self.value(node) * float(self.laws[node][token]))
        self.draws[node].append(child)
        return child


def grow(growths: Sequence[LevelwiseGrowth], distributions: Distributions) -> None:
    """Run the growths of a batch in step, with one call of `distributions` for all of them.

    Args:
        growths: one per tree, not started.
        distributions: draft rows of (index of the growth, node); a node's parent was asked before.
    """
    wanted: dict[int, Sequence[int]] = {}

    def advance(index: int, rows: Sequence[Row] | None) -> None:
        try:
            nodes = next(growths[index]) if rows is None else growths[index].send(rows)
        except StopIteration:
            wanted.pop(index, None)
        else:
            wanted[index] = nodes

    for index in range(len(growths)):
        advance(index, None)
    while wanted:
        asked = list(wanted.items())
        rows = distributions([(index, node) for index, nodes in asked for node in nodes])
        start = 0
        for index, nodes in asked:
            advance(index, rows[start : start + len(nodes)])
            start += len(nodes)
