# SPDX-License-Identifier: Apache-2.0
"""DySpec's growth with drawn tokens (arXiv 2410.11744, algorithms 1 and 2).

`proposers.dyspec` names its tokens; here they are drawn without replacement and verified by
`verify_swor`. The next draw below a node has the value

    v = prod over the node's path of q  *  (1 - sum of q over its children drawn so far),

known before the draw, and the most valuable draw of the tree is made next. `grow_heap` is the
paper's greedy algorithm, which needs the draft model once per node; `grow_threshold` makes every
draw worth at least a threshold, with one forward per level.
"""

from __future__ import annotations

from heapq import heappop, heappush

from proposers.chance import Chance
from proposers.sampled_tree import LevelwiseGrowth, SampledTree
from proposers.tree import ROOT


def grow_heap(tree: SampledTree, size: int, chance: Chance) -> LevelwiseGrowth:
    """The `size` most valuable draws, one after the other.

    Args:
        tree: an empty tree, which is filled.
        size: nodes, at least 1; fewer where support ends.
        chance: decisions.
    """
    heap = [(-1.0, ROOT)]
    while heap and len(tree) < size:
        _, node = heappop(heap)
        if node not in tree.laws:
            (law,) = yield [node]
            tree.expand(node, law)
        child = tree.draw_new(node, chance)
        if child is not None:
            heappush(heap, (-tree.value(node) * tree.rest(node), node))
            heappush(heap, (-tree.value(child), child))


def grow_threshold(
    tree: SampledTree, threshold: float, depth: int, size: int, chance: Chance
) -> LevelwiseGrowth:
    """Every draw whose value is at least `threshold`, level by level.

    Args:
        tree: an empty tree, which is filled.
        threshold: in (0, 1]; the paper takes about the reciprocal of the size aimed at.
        depth: most levels.
        size: most nodes; on the level that reaches it, the most valuable draws come first.
        chance: decisions.
    """
    level = [ROOT]
    for _ in range(depth):
        heap: list[tuple[float, int]] = []
        laws = yield level
        for node, law in zip(level, laws, strict=True):
            tree.expand(node, law)
            heappush(heap, (-tree.value(node), node))
        level = []
        while heap and -heap[0][0] >= threshold and len(tree) < size:
            _, node = heappop(heap)
            child = tree.draw_new(node, chance)
            if child is not None:
                heappush(heap, (-tree.value(node) * tree.rest(node), node))
                if tree.value(child) >= threshold:
                    level.append(child)
        if not level or len(tree) >= size:
            return
