# SPDX-License-Identifier: Apache-2.0
"""Trees drawn without replacement, as in RSD (arXiv 2402.14160); verified by `verify_swor`.

RSD-C draws a fixed number of children at every node of a level. RSD-S keeps the W best paths of a
level by stochastic beam search (arXiv 1903.06059): paths get perturbed log-probabilities G, which
draws W of them without replacement.

Here G is written as an arrival time T = exp(-G). Then the paths of a level arrive in a race: one
of probability P at a time of law Exp(P). All children of a path s together have the rate P(s), so
its first child arrives with s, and after each arrival the next one is

    Exp(1) / (P(s) (1 - sum of q over the children of s that have arrived))

later. Which child it is, is a draw without replacement from q that does not depend on the time, and
times are needed only for paths about to be drawn, so a level costs about 2 W numbers instead of W
times the vocabulary. It also shows why the tree is exact: whether to draw again is decided by times
that were known before the draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import product

from proposers.chance import Chance
from proposers.sampled_tree import LevelwiseGrowth, SampledTree
from proposers.sequoia import grow_template
from proposers.tree import ROOT


def grow_constant(tree: SampledTree, branching: Sequence[int], chance: Chance) -> LevelwiseGrowth:
    """RSD-C: `branching[d]` children at every node of depth d.

    Args:
        tree: an empty tree, which is filled.
        branching: by depth, at least 1.
        chance: decisions.
    """
    levels = range(1, len(branching) + 1)
    template = [path for d in levels for path in product(*map(range, branching[:d]))]
    return grow_template(tree, template, chance)


def grow_stochastic_beam(
    tree: SampledTree, width: int, depth: int, chance: Chance
) -> LevelwiseGrowth:
    """RSD-S: `width` nodes on each of `depth` levels, fewer where support ends.

    Args:
        tree: an empty tree, which is filled.
        width: beam, at least 1.
        depth: levels, at least 1.
        chance: decisions.
    """
    beam = [(0.0, ROOT)]
    for _ in range(depth):
        laws = yield [node for _, node in beam]
        for (_, node), law in zip(beam, laws, strict=True):
            tree.expand(node, law)
        race = beam
        heapify(race)
        beam = []
        while race and len(beam) < width:
            time, node = heappop(race)
            child = tree.draw_new(node, chance)
            if child is None:
                continue
            beam.append((time, child))
            rate = tree.value(node) * tree.rest(node)
            if rate > 0.0:
                heappush(race, (time - math.log1p(-chance.uniform()) / rate, node))
