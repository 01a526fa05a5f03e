# SPDX-License-Identifier: Apache-2.0
"""ADED's tree search (arXiv 2407.12021): drafts by PUCT over the predicted probabilities.

From the root, the search descends into the child with the largest

    W/n + (c1 + ln((N + c2 + 1) / c2)) * P * sqrt(N) / (1 + n),        c1 = 32, c2 = 8

(N, n: visits of parent and child, W: summed rewards, P: the child's probability; an unvisited child
comes first), expands what it reaches, rolls out at random by probability to the depth limit, and
rewards every node on the way with one plus the probabilities along the path. The most visited nodes
become the tree. The paper's verifier, which loses exactness at temperatures above 0, is replaced by
our walk; an expansion asks the mixture, so that the node values are acceptance rates.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from proposers.dyspec import DySpec, DySpecOptions, Growth
from proposers.grower import Draftee, cut, fewer, ordered
from proposers.mixture import Mixture
from proposers.step_cost import StepCost
from proposers.tree import ROOT, TokenTree

_C1, _C2 = 32.0, 8.0


class _Node:
    __slots__ = ("children", "index", "prior", "reward", "value", "visits")

    def __init__(self, index: int, prior: float, value: float) -> None:
        self.index = index
        self.prior = prior
        self.value = value
        self.visits = 0
        self.reward = 0.0
        self.children: list[_Node] | None = None


class Puct(DySpec):
    """Grows trees by the search above.

    Args:
        mixture: what predicts the tokens.
        options: limits.
        iterations: descents per request and step.
        branching: most successors that an expansion adds.
    """

    def __init__(
        self, mixture: Mixture, options: DySpecOptions, *, iterations: int, branching: int = 12
    ) -> None:
        super().__init__(mixture, options)
        self._iterations = iterations
        self._branching = branching

    def grow(
        self,
        draftees: Sequence[Draftee],
        cost: StepCost,
        *,
        base_rows: int,
        base_tokens: float,
        most: int | None = None,
    ) -> list[TokenTree]:
        """See `Grower.grow`."""
        return cut(
            [self._search(draftee) for draftee in draftees],
            cost,
            base_rows=base_rows,
            base_tokens=base_tokens,
            most=fewer(self._options.max_batch_nodes, most),
        )

    def _search(self, draftee: Draftee) -> TokenTree:
        if not draftee.limit:
            return TokenTree.EMPTY
        growth = self.begin(draftee)
        chance = random.Random(0)
        root = _Node(ROOT, 1.0, 1.0)
        nodes: list[_Node] = []
        for _ in range(self._iterations):
            path = [root]
            while path[-1].children:
                path.append(_select(path[-1]))
            leaf = path[-1]
            if leaf.children is None and len(path) <= self._options.max_depth:
                leaf.children = self._expand(growth, leaf, draftee.chain)
                nodes += leaf.children
                # The rollout stays within what is known: one random step below the leaf.
                if leaf.children:
                    weights = [child.prior for child in leaf.children]
                    path.append(chance.choices(leaf.children, weights)[0])
            reward = 1.0 + sum(node.prior for node in path[1:])
            for node in path:
                node.visits += 1
                node.reward += reward
            if not root.children:
                break
        best = sorted(
            (node for node in nodes if node.visits), key=lambda n: (-n.visits, -n.value, n.index)
        )[: draftee.limit]
        chosen = {node.index for node in best}
        # A parent has at least its child's visits, but ties may have cut it off.
        while any(growth.parents[i] not in chosen | {ROOT} for i in chosen):
            chosen = {i for i in chosen if growth.parents[i] in chosen | {ROOT}}
        kept = sorted(chosen)
        place = {index: i for i, index in enumerate(kept)}
        return ordered(
            [growth.tokens[i] for i in kept],
            [place.get(growth.parents[i], ROOT) for i in kept],
            [growth.probs[i] for i in kept],
            draftee.limit,
        )

    def _expand(self, growth: Growth, leaf: _Node, chain: bool) -> list[_Node]:
        found = growth.expand(leaf.index, self.mixture).probs
        best = sorted(found.items(), key=lambda item: (-item[1], item[0]))
        children = []
        for token, prob in best[: 1 if chain else self._branching]:
            prior = min(prob, 1.0)
            value = leaf.value * prior
            if value >= self._options.min_prob:
                children.append(_Node(growth.add(leaf.index, token, value), prior, value))
        return children


def _select(parent: _Node) -> _Node:
    visits = parent.visits
    explore = (_C1 + math.log((visits + _C2 + 1) / _C2)) * math.sqrt(visits)
    best, best_score = None, -1.0
    for child in parent.children or ():
        n = child.visits
        score = math.inf if not n else child.reward / n + explore * child.prior / (1 + n)
        if score > best_score:
            best, best_score = child, score
    assert best is not None  # only nodes with children are selected from
    return best
