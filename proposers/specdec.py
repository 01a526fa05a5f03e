# SPDX-License-Identifier: Apache-2.0
"""A drawn chain that stops where it has probably been rejected: SpecDec++ (arXiv 2405.19715).

The paper stops as soon as the probability that some token was rejected,

    1 - prod over the chain of P(token accepted),

exceeds a threshold, with a trained head for the factors. Without one the draft's own probability of
the token takes its place, as in DySpec. The token that crosses the threshold stays: it was drawn,
and dropping it for what it is would change the law of the output.
"""

from __future__ import annotations

from proposers.chance import Chance
from proposers.sampled_tree import LevelwiseGrowth, SampledTree
from proposers.tree import ROOT


def grow_chain(
    tree: SampledTree, threshold: float, longest: int, chance: Chance
) -> LevelwiseGrowth:
    """Draw tokens until one has probably been rejected.

    Args:
        tree: an empty tree, which is filled.
        threshold: in [0, 1]; 1 never stops early. The paper uses 0.3 with its head.
        longest: most tokens, at least 1.
        chance: decisions.
    """
    node = ROOT
    while len(tree) < longest and 1.0 - tree.value(node) <= threshold:
        (law,) = yield [node]
        tree.expand(node, law)
        node = tree.draw(node, chance)
