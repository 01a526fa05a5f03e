# SPDX-License-Identifier: Apache-2.0
"""SpecTr's drafts (arXiv 2310.15141): independent chains, verified by `verify_kseq`.

Chains that begin alike share their nodes. A node that m chains have reached gets m draws with
replacement, which is as many as the rule finds there: the drafts still alive.
"""

from __future__ import annotations

from proposers.chance import Chance
from proposers.sampled_tree import LevelwiseGrowth, SampledTree
from proposers.tree import ROOT


def grow_chains(tree: SampledTree, chains: int, depth: int, chance: Chance) -> LevelwiseGrowth:
    """Draw `chains` chains of `depth` tokens.

    Args:
        tree: an empty tree, which is filled; at most chains * depth nodes.
        chains: at least 1.
        depth: at least 1.
        chance: decisions.
    """
    alive = {ROOT: chains}
    for _ in range(depth):
        laws = yield list(alive)
        reached: dict[int, int] = {}
        for (node, count), law in zip(alive.items(), laws, strict=True):
            tree.expand(node, law)
            for _ in range(count):
                child = tree.draw(node, chance)
                reached[child] = reached.get(child, 0) + 1
        alive = reached
