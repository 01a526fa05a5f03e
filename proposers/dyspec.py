# SPDX-License-Identifier: Apache-2.0
"""DySpec's greedy tree growth (arXiv 2410.11744, algorithm 1) over all requests of a batch.

A node's value is the probability that its whole path is accepted,

    v(node) = prod over the path of q(token | context),

and the heap always adds the most valuable node, whichever request it belongs to. The paper draws
the tokens and pays for each draw; here a source *names* the tokens, so a node's value is known
before it is added, the trees are deterministic, and keeping a token that equals the target's own
sample is exact. A value never exceeds its parent's, hence the n best nodes of a batch always form
valid trees, and the cost model only has to choose n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from typing import Any, TypeAlias

from proposers.grower import Draftee, cut, fewer, rate
from proposers.mixture import Bias, Mixture, Prediction
from proposers.source import Source, State
from proposers.step_cost import StepCost
from proposers.tree import ROOT, TokenTree

_BRANCH_BRINGS = 2.0
"""Tokens that a tree with branches brings, by the value of its first one: others follow it."""

_Siblings: TypeAlias = list[tuple[float, int]]
"""Children of one node yet to be added, as (-probability, token), the best one last."""


@dataclass(frozen=True, slots=True)
class DySpecOptions:
    """Tunables of the drafter.

    Attributes:
        max_nodes: nodes per request.
        max_batch_nodes: nodes over all requests of a step.
        max_depth: longest path.
        min_prob: nodes below this path probability are never added.
        decay: weight of fresh target probabilities in the recycling tables.
        trigram_capacity: contexts kept in the trigram table (64 bytes each, per namespace).

    Raises:
        ValueError: naming a value that is out of range.
    """

    max_nodes: int = 32
    max_batch_nodes: int = 128
    max_depth: int = 16
    min_prob: float = 0.02
    decay: float = 0.5
    trigram_capacity: int = 2**18

    def __post_init__(self) -> None:
        for name in ("max_nodes", "max_batch_nodes", "max_depth", "trigram_capacity"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"DySpecOptions: {name}={value}; it must be at least 1")
        for name in ("min_prob", "decay"):
            value = getattr(self, name)
            if not 0.0 < value <= 1.0:
                raise ValueError(f"DySpecOptions: {name}={value}; it must be in (0, 1]")


class Growth:
    """One request's tree while it grows, and what was predicted at its expanded nodes."""

    __slots__ = (
        "_states",
        "bias",
        "chain",
        "children",
        "depths",
        "greedy",
        "is_chain",
        "limit",
        "parents",
        "predictions",
        "probs",
        "tokens",
    )

    def __init__(
        self,
        states: list[State],
        *,
        greedy: bool,
        chain: bool,
        limit: int,
        bias: Bias | None = None,
    ) -> None:
        """Begin with the root in the context that `states` stand for."""
        self.bias = bias
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.probs: list[float] = []
        self.depths: list[int] = []
        self.greedy = greedy
        self.chain = chain
        self.is_chain = True  # so far
        self.limit = limit
        self.children: dict[tuple[int, int], int] = {}
        self.predictions: dict[int, Prediction] = {}
        self._states: dict[int, list[State]] = {ROOT: states}

    def expand(self, node: int, mixture: Mixture) -> Prediction:
        """Predict what follows `node`; call once per node, its parent before it."""
        if node == ROOT:
            states = self._states[ROOT]
        else:
            states = mixture.advance(self._states[self.parents[node]], self.tokens[node])
            self._states[node] = states
        prediction = self.predictions[node] = mixture.predict(states, self.greedy, self.bias)
        return prediction

    def add(self, parent: int, token: int, prob: float) -> int:
        """Append a node and return its index."""
        node = len(self.tokens)
        self.is_chain = self.is_chain and parent == node - 1
        self.tokens.append(token)
        self.parents.append(parent)
        self.probs.append(prob)
        self.depths.append(1 if parent == ROOT else self.depths[parent] + 1)
        self.children[parent, token] = node
        return node

    def best_path(self) -> TokenTree:
        """The path of best children, as far as it was grown."""
        path: list[int] = []
        for node, parent in enumerate(self.parents):
            if parent == (path[-1] if path else ROOT):
                path.append(node)
        return TokenTree.chain([self.tokens[n] for n in path], [self.probs[n] for n in path])

    def members(self, tree: TokenTree) -> set[int]:
        """The nodes that `tree` has, which was made of this growth."""
        at = {ROOT: ROOT}
        for node, (parent, token) in enumerate(zip(tree.parents, tree.tokens, strict=True)):
            at[node] = self.children[at[parent], token]
        return set(at.values()) - {ROOT}

    def tree(self, n: int) -> TokenTree:
        """The first `n` nodes."""
        return TokenTree(tuple(self.tokens[:n]), tuple(self.parents[:n]), tuple(self.probs[:n]))


class DySpec:
    """The grower of this module over one mixture.

    Args:
        mixture: what predicts the tokens.
        options: limits.

    Attributes:
        mixture: as given.
    """

    spent = 0.0

    def __init__(self, mixture: Mixture, options: DySpecOptions) -> None:
        self.mixture = mixture
        self._options = options
        self._growths: dict[str, Growth] = {}
        self._biases: dict[str, Bias] = {}

    @property
    def sources(self) -> tuple[Source, ...]:
        """See `Grower.sources`."""
        return self.mixture.sources

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
        growths = [self.begin(draftee) for draftee in draftees]
        return grow(
            growths,
            self.mixture,
            cost,
            self._options,
            base_rows=base_rows,
            base_tokens=base_tokens,
            most=most,
        )

    def begin(self, draftee: Draftee) -> Growth:
        """A request's growth with its root alone; it becomes the one that `learn` looks at."""
        growth = self._growths[draftee.request] = Growth(
            self.mixture.root(draftee.request),
            greedy=draftee.greedy,
            chain=draftee.chain,
            limit=draftee.limit,
            bias=self._bias(draftee.request),
        )
        return growth

    def prediction(self, request: str) -> Prediction | None:
        """What was expected after a request's committed text, if it was asked."""
        growth = self._growths.get(request)
        return growth.predictions.get(ROOT) if growth is not None else None

    def _bias(self, request: str) -> Bias:
        bias = self._biases.get(request)
        if bias is None:
            bias = self._biases[request] = Bias(len(self.mixture.sources))
        return bias

    def learn(self, request: str, tokens: Sequence[int]) -> None:
        """See `Grower.learn`."""
        growth = self._growths.pop(request, None)
        if growth is None:
            return
        node = ROOT
        for token in tokens:
            prediction = growth.predictions.get(node)
            if prediction is None:
                return
            self.mixture.learn(prediction, token)
            child = growth.children.get((node, token))
            if child is None:
                return
            node = child

    def stop(self, request: str) -> None:
        """See `Grower.stop`."""
        self._growths.pop(request, None)
        self._biases.pop(request, None)


def grow(
    growths: Sequence[Growth],
    mixture: Mixture,
    cost: StepCost,
    options: DySpecOptions,
    *,
    base_rows: int,
    base_tokens: float,
    spent: float = 0.0,
    most: int | None = None,
) -> list[TokenTree]:
    """Grow the trees of a batch together and cut them where more nodes would not pay.

    Args:
        growths: one fresh growth per request; they are filled.
        mixture: what predicts the tokens.
        cost: latency by rows.
        options: limits.
        base_rows: rows of the step without drafts.
        base_tokens: tokens that the step yields without drafts.
        spent: seconds of drafting so far that `cost` does not contain.
        most: see `Grower.grow`.

    Returns:
        One tree per growth, nodes best first.
    """
    limit = min(fewer(options.max_batch_nodes, most), sum(growth.limit for growth in growths))
    search = cost.search(base_rows, base_tokens, limit, spent)
    floor = max(options.min_prob, search.min_prob)

    # A tree's first branch costs an attention of its own, and must bring the tokens that the batch
    # could have in that time; so trees of large batches are chains.
    least_branch = cost.branching * base_tokens / cost.seconds(base_rows) / _BRANCH_BRINGS

    # Of a node's children only the best one not yet added waits in the heap, with the rest behind
    # it. The counter keeps the order of equals reproducible.
    heap: list[tuple[float, int, int, int, float, _Siblings]] = []
    counter = count()
    owners: list[int] = []

    def expand(index: int, node: int, value: float) -> None:
        growth = growths[index]
        least = floor / value
        found = growth.expand(node, mixture).probs
        siblings = [(-min(q, 1.0), token) for token, q in found.items() if q >= least]
        if siblings:
            siblings.sort(reverse=True)
            if growth.chain:
                del siblings[:-1]
            heappush(heap, (siblings[-1][0] * value, next(counter), index, node, value, siblings))

    for index, growth in enumerate(growths):
        if growth.limit:
            expand(index, ROOT, 1.0)
    while heap and len(owners) < limit:
        negative, _, index, parent, above, siblings = heappop(heap)
        growth, value = growths[index], -negative
        if len(growth.tokens) >= growth.limit:
            continue
        if search.hopeless(value):
            break
        first_branch = growth.is_chain and parent != len(growth.tokens) - 1
        if first_branch and value < least_branch:
            continue
        node = growth.add(parent, siblings.pop()[1], value)
        if siblings:
            heappush(heap, (siblings[-1][0] * above, next(counter), index, parent, above, siblings))
        owners.append(index)
        search.add(value, cost.branching if first_branch else 0.0)
        if growth.depths[node] < options.max_depth and len(growth.tokens) < growth.limit:
            expand(index, node, value)

    kept = [0] * len(growths)
    for index in owners[: search.size]:
        kept[index] += 1
    trees = [growth.tree(n) for growth, n in zip(growths, kept, strict=True)]
    if not cost.branching or all(tree.is_chain for tree in trees):
        return trees
    step: dict[str, Any] = {"base_rows": base_rows, "base_tokens": base_tokens, "spent": spent}
    chains = cut([growth.best_path() for growth in growths], cost, most=limit, **step)
    return max([trees, chains], key=lambda those: rate(those, cost, **step))
