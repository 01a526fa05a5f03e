# SPDX-License-Identifier: Apache-2.0
"""Sequoia's optimal static tree (arXiv 2402.12374, section 4.1) and the sampled tree of its shape.

If the r-th child of a node is accepted with a probability a_r that is the same at every node, a
tree brings sum over its nodes of prod a_r along the path. The best tree of n nodes has a first
child with the best subtree of some m nodes, and beside it the best forest of later children:

    F(n, r) = max over m of a_r (1 + F(m - 1, 0)) + F(n - m, r + 1),    F(0, r) = 0.

A child is drawn only after its elder siblings, so shapes have no gaps, also where a later rank is
accepted more often than an earlier one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from proposers.chance import Chance
from proposers.sampled_tree import LevelwiseGrowth, SampledTree
from proposers.template import Path
from proposers.tree import ROOT


class OptimalTemplates:
    """The best shapes of every size and depth up to a largest, from one table.

    Args:
        acceptance: by rank from 0, how often the child of that rank is accepted where its parent
            was; the sum is at most 1. Its length is the most children of a node.
        size: most nodes, at least 1; time is proportional to its square.
        depth: most levels, at least 1.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    def __init__(self, acceptance: Sequence[float], size: int, depth: int) -> None:
        if not acceptance or min(acceptance) < 0.0 or not sum(acceptance) <= 1.0 + 1e-9:
            raise ValueError(
                f"OptimalTemplates: acceptance={list(acceptance)}; give probabilities of "
                "exclusive events, one per rank"
            )
        if size < 1 or depth < 1:
            raise ValueError(f"OptimalTemplates: size={size}, depth={depth}; both are at least 1")
        ranks = len(acceptance)
        # best[d, r, n]: the most from n nodes in d levels below one node whose children start at
        # rank r; taken[d, r, n]: how many of them go to the child r and its subtree.
        self._best = best = np.zeros((depth + 1, ranks + 1, size + 1))
        self._taken = taken = np.zeros((depth + 1, ranks + 1, size + 1), np.int64)
        nodes = np.arange(1, size + 1)
        left = nodes[:, None] - nodes  # [n, m]: what n nodes leave beside a subtree of m
        impossible = np.where(left < 0, -np.inf, 0.0)
        for d in range(1, depth + 1):
            for r in reversed(range(ranks)):
                subtree = acceptance[r] * (1.0 + best[d - 1, 0, :size])
                totals = subtree + best[d, r + 1, left] + impossible
                m = totals.argmax(1)
                most = totals[nodes - 1, m]
                best[d, r, 1:], taken[d, r, 1:] = most, np.where(most > 0.0, m + 1, 0)

    def accepted(self, size: int, depth: int) -> float:
        """How many nodes of the best shape of `size` nodes and `depth` levels are accepted."""
        return float(self._best[depth, 0, size])

    def template(self, size: int, depth: int) -> tuple[Path, ...]:
        """The best shape of at most `size` nodes and `depth` levels.

        Returns:
            Rank paths, parents first, as `proposers.template.StaticTemplate` takes them.
        """
        paths: list[Path] = []
        stack: list[tuple[Path, int, int, int]] = [((), depth, 0, size)]
        while stack:
            above, d, r, n = stack.pop()
            m = int(self._taken[d, r, n])
            if m:
                path = (*above, r)
                paths.append(path)
                stack.append((path, d - 1, 0, m - 1))
                stack.append((above, d, r + 1, n - m))
        return tuple(sorted(paths, key=lambda path: (len(path), path)))


def grow_template(tree: SampledTree, template: Sequence[Path], chance: Chance) -> LevelwiseGrowth:
    """Draw a tree of a fixed shape without replacement; fewer children where support ends.

    Args:
        tree: an empty tree, which is filled.
        template: rank paths without gaps: with (1, 2) there are (1,), (1, 0) and (1, 1).
        chance: decisions.

    Raises:
        ValueError: at the first step, if the template has a gap.
    """
    known = set(template)
    for path in template:
        needed = path[:-1] if path[-1] == 0 else (*path[:-1], path[-1] - 1)
        if needed and needed not in known:
            raise ValueError(f"grow_template: the template has {path} without {needed}")
    level: dict[Path, int] = {(): ROOT}
    while True:
        nodes = {path: node for path, node in level.items() if (*path, 0) in known}
        if not nodes:
            return
        laws = yield list(nodes.values())
        level = {}
        for (path, node), law in zip(nodes.items(), laws, strict=True):
            tree.expand(node, law)
            rank = 0
            while (*path, rank) in known:
                child = tree.draw_new(node, chance)
                if child is None:
                    break
                level[(*path, rank)] = child
                rank += 1
