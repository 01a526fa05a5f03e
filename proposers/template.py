# SPDX-License-Identifier: Apache-2.0
"""Token Recycling's static tree (arXiv 2408.08696): the same shape in every step.

A template is a set of rank paths: node (r_1, ..., r_d) holds the r_d-th best successor of its
parent's token in the adjacency matrix,

    token(node) = M[token(parent), r_d].

The paper's template has 80 nodes on six levels. So that the cost model can leave out what does not
pay, each node has a probability: the rate at which it was accepted when its parent was, learned
online, times that of its parent.
"""

from __future__ import annotations

from collections.abc import Sequence

from proposers.grower import Draftee, cut, fewer, ordered
from proposers.source import Candidates, Source, State
from proposers.step_cost import StepCost
from proposers.tree import ROOT, TokenTree

Path = tuple[int, ...]

_FAN_OUT: dict[Path, int] = {
    (): 8,
    (0,): 8, (1,): 4, (2,): 3, (3,): 2, (4,): 1, (5,): 1, (6,): 1, (7,): 1,
    (0, 0): 8, (0, 1): 3, (0, 2): 2, (0, 3): 1, (0, 4): 1, (0, 5): 1, (0, 6): 1, (0, 7): 1,
    (1, 0): 2, (1, 1): 1, (2, 0): 1, (3, 0): 1, (4, 0): 1, (5, 0): 1,
    (0, 0, 0): 5, (0, 0, 1): 2, (0, 0, 2): 1, (0, 0, 3): 1, (0, 0, 4): 1, (0, 1, 0): 1,
    (0, 2, 0): 1, (1, 0, 0): 1, (2, 0, 0): 1, (3, 0, 0): 1,
    (0, 0, 0, 0): 3, (0, 0, 0, 1): 1, (0, 0, 0, 2): 1, (0, 0, 1, 0): 1, (0, 1, 0, 0): 1,
    (1, 0, 0, 0): 1,
    (0, 0, 0, 0, 0): 2, (0, 0, 0, 1, 0): 1,
}  # fmt: skip

PAPER: tuple[Path, ...] = tuple(
    sorted(
        ((*parent, rank) for parent, n in _FAN_OUT.items() for rank in range(n)),
        key=lambda path: (len(path), path),
    )
)
"""The paper's 80 nodes, parents before children."""

_RANK_PRIOR = (0.33, 0.085, 0.036, 0.03, 0.022, 0.019, 0.012, 0.012)
"""Acceptance by rank before any feedback, as measured once on a 135M chat model."""

_PRIOR_STRENGTH = 20.0
_MEMORY = 2000.0


class StaticTemplate:
    """Grows the same template in every step, over one source.

    Args:
        source: what ranks the successors.
        template: rank paths, each after its parent.
        max_batch_nodes: nodes over all requests of a step.
    """

    spent = 0.0

    def __init__(
        self,
        source: Source,
        template: Sequence[Path] = PAPER,
        *,
        max_batch_nodes: int = 1024,
    ) -> None:
        self._source = source
        self._template = tuple(template)
        self._max_batch_nodes = max_batch_nodes
        # Accepted and verified, by template node; greedy and sampled requests apart.
        self._counts = {
            greedy: {path: [_RANK_PRIOR[min(path[-1], 7)] * k, k] for path in self._template}
            for greedy in (True, False)
            for k in (_PRIOR_STRENGTH,)
        }
        self._grown: dict[str, tuple[dict[Path, int], bool]] = {}

    @property
    def sources(self) -> tuple[Source, ...]:
        """See `Grower.sources`."""
        return (self._source,)

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
            [self._tree(draftee) for draftee in draftees],
            cost,
            base_rows=base_rows,
            base_tokens=base_tokens,
            most=fewer(self._max_batch_nodes, most),
        )

    def learn(self, request: str, tokens: Sequence[int]) -> None:
        """See `Grower.learn`."""
        found = self._grown.pop(request, None)
        if found is None:
            return
        token_at, greedy = found
        counts = self._counts[greedy]
        parent: Path = ()
        for token in tokens:
            hit = None
            for rank in range(len(_RANK_PRIOR)):
                path = (*parent, rank)
                if path not in token_at:
                    continue
                count = counts[path]
                if count[1] > _MEMORY:
                    count[0], count[1] = count[0] / 2, count[1] / 2
                count[1] += 1.0
                if token_at[path] == token:
                    count[0] += 1.0
                    hit = path
            if hit is None:
                return
            parent = hit

    def stop(self, request: str) -> None:
        """See `Grower.stop`."""
        self._grown.pop(request, None)

    def _tree(self, draftee: Draftee) -> TokenTree:
        if not draftee.limit:
            return TokenTree.EMPTY
        source, counts = self._source, self._counts[draftee.greedy]
        states: dict[Path, State] = {(): source.root(draftee.request)}
        ranked: dict[Path, list[int]] = {}
        tokens: list[int] = []
        parents: list[int] = []
        probs: list[float] = []
        node_of: dict[Path, int] = {}
        for path in self._template:
            above, rank = path[:-1], path[-1]
            if (above and above not in node_of) or (draftee.chain and rank):
                continue
            if above not in ranked:
                if above:
                    states[above] = source.advance(states[above[:-1]], tokens[node_of[above]])
                ranked[above] = _by_rank(source.candidates(states[above])[1])
            if rank >= len(ranked[above]):
                continue
            accepted, verified = counts[path]
            node_of[path] = len(tokens)
            tokens.append(ranked[above][rank])
            parents.append(node_of[above] if above else ROOT)
            probs.append(accepted / verified * (probs[node_of[above]] if above else 1.0))
        self._grown[draftee.request] = (
            {path: tokens[node] for path, node in node_of.items()},
            draftee.greedy,
        )
        return ordered(tokens, parents, probs, draftee.limit)


def _by_rank(found: Candidates) -> list[int]:
    return sorted(found, key=lambda token: (-found[token], token))
