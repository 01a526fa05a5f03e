# SPDX-License-Identifier: Apache-2.0
"""RASD (arXiv 2503.03434): a retrieval tree and a draft tree, pruned and fused.

1. The draft sources grow a tree, and the retrieval sources (a datastore, the prompt and the answer
   so far) grow another one.
2. Pruning: a retrieved continuation stays only if its first token is among the `top_k` most
   probable ones of the draft's own distribution at the root.
3. Fusion: every retrieved path follows the draft tree while the tokens agree (longest prefix) and
   what is left of it is grafted there, so that no two siblings hold the same token.

A node's value is the larger one of its two estimates, capped by its parent's. Retrieval without any
draft distribution at the root is not pruned: there is nothing to judge it by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from proposers.cost_model import CostModel
from proposers.dyspec import DySpec, DySpecOptions, Growth, grow
from proposers.grower import Draftee, cut, fewer, ordered
from proposers.layerwise import Layerwise
from proposers.mixture import Mixture, Prediction
from proposers.source import Source
from proposers.step_cost import StepCost
from proposers.tree import ROOT, TokenTree


class _FreeRows(CostModel):
    """Both trees grow to their limits; the fused one is cut by the true cost."""

    def __init__(self) -> None:
        super().__init__([(1, 1.0)], margin=0.0)


class Rasd:
    """Grows fused trees.

    Args:
        draft: grows the draft trees, by the true cost if a draft model is part of it.
        retrieval: grows the retrieval trees.
        options: limits, for each tree and for the fused one.
        top_k: first tokens that retrieval may begin with.
    """

    spent = 0.0

    def __init__(
        self, draft: DySpec, retrieval: DySpec, options: DySpecOptions, *, top_k: int
    ) -> None:
        self._draft = draft
        self._retrieval = retrieval
        self._options = options
        self._top_k = top_k
        self._free = _FreeRows()

    @property
    def sources(self) -> tuple[Source, ...]:
        """See `Grower.sources`."""
        return self._draft.sources + self._retrieval.sources

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
        true = cost if isinstance(self._draft, Layerwise) else self._free
        drafted = self._draft.grow(
            draftees, true, base_rows=base_rows, base_tokens=base_tokens, most=most
        )
        self.spent = self._draft.spent
        fused = []
        for draftee, tree in zip(draftees, drafted, strict=True):
            allowed = self._allowed(self._draft.prediction(draftee.request))
            growth = _Pruned(self._retrieval.begin(draftee), allowed)
            (retrieved,) = grow(
                [growth],
                self._retrieval.mixture,
                self._free,
                self._options,
                base_rows=1,
                base_tokens=1.0,
            )
            fused.append(fuse(tree, retrieved, draftee.limit, chain=draftee.chain))
        return cut(
            fused,
            cost,
            base_rows=base_rows,
            base_tokens=base_tokens,
            most=fewer(self._options.max_batch_nodes, most),
            spent=self.spent,
        )

    def learn(self, request: str, tokens: Sequence[int]) -> None:
        """See `Grower.learn`."""
        self._draft.learn(request, tokens)
        self._retrieval.learn(request, tokens)

    def stop(self, request: str) -> None:
        """See `Grower.stop`."""
        self._draft.stop(request)
        self._retrieval.stop(request)

    def _allowed(self, root: Prediction | None) -> frozenset[int] | None:
        if root is None or not root.probs:
            return None
        best = sorted(root.probs, key=lambda token: (-root.probs[token], token))
        return frozenset(best[: self._top_k])


class _Pruned(Growth):
    """A growth that begins with some tokens only; what is learnt from it is not pruned."""

    __slots__ = ("_allowed",)

    def __init__(self, whole: Growth, allowed: frozenset[int] | None) -> None:
        for name in Growth.__slots__:
            setattr(self, name, getattr(whole, name))  # shared: `learn` looks at `whole`
        self._allowed = allowed

    def expand(self, node: int, mixture: Mixture) -> Prediction:
        """As the base class, without the pruned tokens at the root."""
        prediction = super().expand(node, mixture)
        allowed = self._allowed
        if node != ROOT or allowed is None:
            return prediction
        kept = {token: prob for token, prob in prediction.probs.items() if token in allowed}
        return replace(prediction, probs=kept)


def fuse(drafted: TokenTree, retrieved: TokenTree, limit: int, *, chain: bool) -> TokenTree:
    """The union of two trees by their paths, `limit` nodes at most.

    Args:
        drafted: nodes by falling probability, as `retrieved`.
        retrieved: its paths are grafted onto `drafted`.
        limit: most nodes.
        chain: keep only the more promising one of the two, which are chains.
    """
    if chain:
        return max(drafted, retrieved, key=lambda tree: sum(tree.probs[:limit])).prefix(limit)
    tokens, parents = list(drafted.tokens), list(drafted.parents)
    probs = list(drafted.probs)
    child = {pair: i for i, pair in enumerate(zip(parents, tokens, strict=True))}
    place: dict[int, int] = {ROOT: ROOT}
    for node, (token, parent) in enumerate(zip(retrieved.tokens, retrieved.parents, strict=True)):
        above, prob = place[parent], retrieved.probs[node]
        known = child.get((above, token))
        if known is None:
            known = child[above, token] = len(tokens)
            tokens.append(token)
            parents.append(above)
            probs.append(prob)
        elif probs[known] < prob:
            probs[known] = prob
        place[node] = known
    for node, parent in enumerate(parents):
        if parent != ROOT:
            probs[node] = min(probs[node], probs[parent])
    return ordered(tokens, parents, probs, limit)
