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

Growers are generators which yield the nodes whose draft laws they want next and are sent
one for each, so that `grow` needs one forward of the draft model per level of a whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeAlias

from proposers.chance import Chance
from proposers.law import DraftLaw
from proposers.tree import ROOT, TokenTree

LevelwiseGrowth: TypeAlias = Generator[Sequence[int], Sequence[DraftLaw], None]
"""A tree in the making: yields nodes, is sent the laws of their children."""

Distributions: TypeAlias = Callable[[Sequence[tuple[int, int]]], Sequence[DraftLaw]]
"""Laws for pairs (index of the tree in the batch, node), from one forward of the draft model."""


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
        self.laws: dict[int, DraftLaw] = {}
        self.draws: dict[int, list[int]] = {}
        self._places: list[int] = []  # of each node's token in the law that it was drawn from

    def __len__(self) -> int:
        return len(self.tokens)

    def value(self, node: int) -> float:
        """The node's value; 1 for the root."""
        return 1.0 if node == ROOT else self.values[node]

    def expand(self, node: int, law: DraftLaw) -> None:
        """Set the law of the children of `node`, before the first of them is drawn."""
        self.laws[node] = law
        self.draws[node] = []

    def rest(self, node: int) -> float:
        """Probability that the law of `node` gives to tokens not drawn there yet, about 0 at the
        end of its support.
        """
        probs = self.laws[node].probs
        drawn = {self._places[child] for child in self.draws[node]}
        return max(0.0, 1.0 - sum(float(probs[place]) for place in drawn))

    def draw_new(self, node: int, chance: Chance) -> int | None:
        """Draw a child without replacement; ``None`` where every possible token was drawn."""
        weights = self.laws[node].probs.copy()
        for child in self.draws[node]:
            weights[self._places[child]] = 0.0
        if not weights.any():
            return None
        return self._add(node, chance.draw(weights))

    def draw(self, node: int, chance: Chance) -> int:
        """Draw a child with replacement; a token drawn before leads to the same child."""
        place = chance.draw(self.laws[node].probs)
        for child in self.draws[node]:
            if self._places[child] == place:
                self.draws[node].append(child)
                return child
        return self._add(node, place)

    def token_tree(self) -> TokenTree:
        """The nodes as the engine schedules them; any prefix may be given target rows."""
        return TokenTree(tuple(self.tokens), tuple(self.parents), tuple(self.values))

    def _add(self, node: int, place: int) -> int:
        law, child = self.laws[node], len(self.tokens)
        self.tokens.append(int(law.tokens[place]))
        self.parents.append(node)
        self.values.append(self.value(node) * float(law.probs[place]))
        self.draws[node].append(child)
        self._places.append(place)
        return child


def grow(growths: Sequence[LevelwiseGrowth], distributions: Distributions) -> None:
    """Run the growths of a batch in step, with one call of `distributions` for all of them.

    Args:
        growths: one per tree, not started.
        distributions: laws of (index of the growth, node); a node's parent was asked before.
    """
    wanted: dict[int, Sequence[int]] = {}

    def advance(index: int, laws: Sequence[DraftLaw] | None) -> None:
        try:
            nodes = next(growths[index]) if laws is None else growths[index].send(laws)
        except StopIteration:
            wanted.pop(index, None)
        else:
            wanted[index] = nodes

    for index in range(len(growths)):
        advance(index, None)
    while wanted:
        asked = list(wanted.items())
        laws = distributions([(index, node) for index, nodes in asked for node in nodes])
        start = 0
        for index, nodes in asked:
            advance(index, laws[start : start + len(nodes)])
            start += len(nodes)
