# SPDX-License-Identifier: Apache-2.0
"""What turns sources into trees: the interface that the drafter grows its trees through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from proposers.source import Source
from proposers.step_cost import StepCost
from proposers.tree import ROOT, TokenTree

ENDLESS = 2**31
"""Tokens of a request whose end is not known."""


@dataclass(frozen=True, slots=True)
class Draftee:
    """A request that wants a tree.

    Attributes:
        request: its id.
        greedy: whether the target takes its most probable token rather than a sample.
        chain: only a path without branches can be verified.
        limit: most nodes; 0 wants none.
        left: most tokens that it may still get.
    """

    request: str
    greedy: bool
    chain: bool
    limit: int
    left: int = ENDLESS


def cut(
    trees: Sequence[TokenTree],
    cost: StepCost,
    *,
    base_rows: int,
    base_tokens: float,
    most: int,
    spent: float = 0.0,
) -> list[TokenTree]:
    """The best nodes of a batch of finished trees, as many as pay.

    Args:
        trees: nodes of each by falling probability.
        cost: latency by rows.
        base_rows: rows of the step without drafts.
        base_tokens: tokens that the step yields without drafts.
        most: nodes over all trees.
        spent: seconds of drafting so far that `cost` does not contain.
    """
    order = sorted((-p, index) for index, tree in enumerate(trees) for p in tree.probs)[:most]
    search = cost.search(base_rows, base_tokens, len(order), spent)
    for negative, _ in order:
        search.add(-negative)
    kept = [0] * len(trees)
    for _, index in order[: search.size]:
        kept[index] += 1
    return [tree.prefix(n) for tree, n in zip(trees, kept, strict=True)]


def rate(
    trees: Sequence[TokenTree],
    cost: StepCost,
    *,
    base_rows: int,
    base_tokens: float,
    spent: float = 0.0,
) -> float:
    """Expected tokens per second of a step with these trees; arguments as of `cut`."""
    tokens = base_tokens + sum(sum(tree.probs) for tree in trees)
    return tokens / (cost.seconds_with(base_rows, trees) + spent)


def fewer(limit: int, most: int | None) -> int:
    """A grower's own limit on the nodes of a batch, or `most` if the step has room for fewer."""
    return limit if most is None else min(limit, most)


def ordered(
    tokens: Sequence[int], parents: Sequence[int], probs: Sequence[float], limit: int
) -> TokenTree:
    """The `limit` most probable nodes, best first; no node is more probable than its parent."""
    order = sorted(range(len(tokens)), key=lambda node: (-probs[node], node))[:limit]
    place = {node: i for i, node in enumerate(order)}
    return TokenTree(
        tuple(tokens[node] for node in order),
        tuple(ROOT if parents[node] == ROOT else place[parents[node]] for node in order),
        tuple(probs[node] for node in order),
    )


class Grower(Protocol):
    """Grows the trees of a batch. Its sources know the requests; it keeps what it predicted.

    Attributes:
        spent: seconds that the latest trees cost beyond what the cost model knows of, namely the
            forward passes of a draft model, as far as they speak for or against drafting.
    """

    spent: float

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources it asks; the drafter tells them of requests and of verified rows."""

    def grow(
        self,
        draftees: Sequence[Draftee],
        cost: StepCost,
        *,
        base_rows: int,
        base_tokens: float,
        most: int | None = None,
    ) -> list[TokenTree]:
        """One tree per draftee, cut where more nodes would not pay.

        Args:
            draftees: the batch.
            cost: latency by rows.
            base_rows: rows of the step without drafts.
            base_tokens: tokens that the step yields without drafts.
            most: nodes over all trees, if the step has room for fewer than the grower's own limit.
        """

    def learn(self, request: str, tokens: Sequence[int]) -> None:
        """Compare a request's latest prediction with the tokens it committed; called before its
        sources are told of them.
        """

    def stop(self, request: str) -> None:
        """Forget a request; unknown ones are ignored."""
