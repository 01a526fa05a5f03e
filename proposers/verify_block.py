# SPDX-License-Identifier: Apache-2.0
"""Block verification of a chain (arXiv 2403.10444, algorithm 2).

For a chain x_1 ... x_n, with P_i and Q_i the target's and the draft's law after x_1 ... x_i,

    w_0 = 1,    w_i = min(1, w_{i-1} P_{i-1}(x_i) / Q_{i-1}(x_i)),
    s_i = sum_x (w_i P_i(x) - Q_i(x))+,    h_i = s_i / (s_i + 1 - w_i) for i < n,    h_n = w_n,

each length i is accepted with probability h_i on its own and the longest accepted one, t, is kept.
The token after it is drawn from norm((w_t P_t - Q_t)+), or from P_n if t = n. No rule for chains
keeps more tokens; the ratio rule judges each token alone and keeps fewer. A chain may end where
its own tokens say so (SpecDec++), since Q_i counts only where x_{i+1} was drawn.
"""

from __future__ import annotations

import numpy as np

from proposers.chance import Chance
from proposers.law import Law, Row, normalised
from proposers.sampled_tree import SampledTree
from proposers.tree import ROOT


class BlockWalk:
    """Block verification as a `proposers.verify_tree.Verification`; nothing is emitted before its
    last row has come.

    Args:
        tree: a chain.
        chance: decisions independent of the drafting.
        rows: how many nodes have a target row, the first ones; all by default.

    Raises:
        ValueError: if the tree branches.
    """

    def __init__(self, tree: SampledTree, chance: Chance, *, rows: int | None = None) -> None:
        if any(parent != node - 1 for node, parent in enumerate(tree.parents)):
            raise ValueError("BlockWalk: the tree branches; block verification takes chains")
        self.node: int | None = ROOT
        self.tokens: list[int] = []
        self.path: list[int] = []
        self._tree = tree
        self._chance = chance
        self._rows = len(tree) if rows is None else min(rows, len(tree))
        self._targets: list[Law] = []
        self._weights = [1.0]

    def feed(self, row: Row) -> None:
        """See `proposers.verify_tree.Verification.feed`.

        Raises:
            ValueError: if the walk has ended, or the row is no law.
        """
        if self.node is None:
            raise ValueError("BlockWalk.feed: the walk has ended; it takes no further row")
        p, tree = normalised(row), self._tree
        self._targets.append(p)
        child = self.node + 1
        weight = 0.0
        if child < len(tree):
            token, law = tree.tokens[child], tree.laws[self.node]
            ratio = float(p[token]) / float(law.probs[law.place(token)])
            weight = min(1.0, self._weights[-1] * ratio)
            self._weights.append(weight)
        # Behind a token that the target excludes nothing can be accepted.
        if child < self._rows and weight > 0.0:
            self.node = child
        else:
            self.node = None
            self._decide()

    def _decide(self) -> None:
        tokens, last = self._tree.tokens, len(self._weights) - 1
        kept = last
        while kept and not self._chance.accept(self._probability(kept, last)):
            kept -= 1
        self.tokens = tokens[:kept]
        if kept < last:
            excess = self._excess(kept)
            # Laws that are equal but for rounding leave nothing; then any law will do.
            token = self._chance.draw(excess if excess.any() else self._targets[kept])
            self.tokens.append(token)
        elif kept < len(self._targets):
            self.tokens.append(self._chance.draw(self._targets[kept]))
        self.path = list(range(len(self.tokens) - 1))

    def _probability(self, length: int, last: int) -> float:
        weight = self._weights[length]
        if length == last:
            return weight
        excess = float(self._excess(length).sum())
        return excess / (excess + 1.0 - weight) if weight < 1.0 else 1.0

    def _excess(self, length: int) -> Law:
        law = self._tree.laws[length - 1]
        excess = self._weights[length] * self._targets[length]
        excess[law.tokens] = np.maximum(excess[law.tokens] - law.probs, 0.0)
        return excess
