# SPDX-License-Identifier: Apache-2.0
"""A trie of visited prefixes that learns how much of the model's mass can still become valid.

For a prefix ``w`` let ``EFG(w)`` be the probability under ``p`` that a continuation of ``w``
satisfies the constraint ("expected future grammaticality", arXiv 2405.21047). It keeps upper bounds
``c(w) >= EFG(w)``: 1 for a prefix never seen, and for a visited one

    c(w) = sum over allowed x of p(x | w) c(wx).

Each visit can only lower them, and they reach ``EFG`` as prefixes are visited. A node stores its
visited children one by one and the mass of all the others as one number, summed afresh at each
visit (subtracting would cancel where little is left).

One trie serves all requests of one prompt, constraint and sampling law; see
:mod:`logits_processors.trie_store`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .law import logsumexp


class Node:
    """A prefix.

    Attributes:
        parent: the prefix without its last token; ``None`` at the root.
        token: that last token; -1 at the root.
        log_edge: log probability of ``token`` after the parent, as of the last visit there.
        log_live: ``log c`` of this prefix.
        log_rest: log mass of the allowed tokens without a child; ``None`` before the first visit.
        children: by token.
    """

    __slots__ = ("children", "log_edge", "log_live", "log_rest", "parent", "token")

    def __init__(self, parent: Node | None, token: int, log_edge: float) -> None:
        self.parent = parent
        self.token = token
        self.log_edge = log_edge
        self.log_live = 0.0
        self.log_rest: float | None = None
        self.children: dict[int, Node] = {}


class PrefixTrie:
    """The bounds ``c`` of one (prompt, constraint, sampling law).

    Args:
        max_nodes: prefixes kept. A full trie stops growing and goes on learning where it has nodes:
            dropping nodes would raise bounds that running draws rely on.

    Raises:
        ValueError: ``max_nodes`` is not positive.
    """

    def __init__(self, max_nodes: int = 100_000) -> None:
        if max_nodes < 1:
            raise ValueError(f"max_nodes={max_nodes}: at least 1 is allowed")
        self.max_nodes = max_nodes
        self.root = Node(None, -1, 0.0)
        self.num_nodes = 1

    def __iter__(self) -> Iterator[Node]:
        """Iterate over all nodes, parents before children."""
        level = [self.root]
        while level:
            yield from level
            level = [child for node in level for child in node.children.values()]

    def observe(
        self, node: Node, log_allowed: NDArray[np.float64], chosen: int | None
    ) -> Node | None:
        """Record the law at ``node`` and the token that was emitted there.

        Args:
            node: a node of this trie.
            log_allowed: ``float64[V]``, ``log p(. | node)``, ``-inf`` for forbidden tokens.
            chosen: the emitted token, which gets a child while there is room; ``None`` for none.

        Returns:
            The child of ``chosen``, ``None`` if there is none.
        """
        if chosen is not None and chosen not in node.children and self.num_nodes < self.max_nodes:
            node.children[chosen] = Node(node, chosen, float(log_allowed[chosen]))
            self.num_nodes += 1
        rest = log_allowed.copy()
        for token, child in node.children.items():
            child.log_edge = float(log_allowed[token])
            rest[token] = -np.inf
        node.log_rest = min(0.0, logsumexp(rest))
        self._update(node)
        return None if chosen is None else node.children.get(chosen)

    def refute(self, node: Node) -> None:
        """Record that no continuation of ``node`` is valid."""
        node.log_live = -math.inf
        node.log_rest = -math.inf
        if node.parent is not None:
            self._update(node.parent)

    def recompute(self) -> None:
        """Recompute ``c`` of every node from the edges and rests, leaves first."""
        for node in reversed(list(self)):
            node.log_live = _bound(node)

    def _update(self, node: Node) -> None:
        """Recompute ``c`` from ``node`` up to the root."""
        current: Node | None = node
        while current is not None and current.log_rest is not None:
            current.log_live = _bound(current)
            current = current.parent


def _bound(node: Node) -> float:
    """Return ``log c`` of ``node`` by the bounds of its children."""
    if node.log_rest is None:
        return 0.0
    terms = [child.log_edge + child.log_live for child in node.children.values()]
    return min(0.0, logsumexp(np.array([*terms, node.log_rest])))


def bound_children(
    node: Node | None, log_allowed: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Return ``log(p(x) c(wx))`` for every token ``x``, ``float64[V]``, and the log of its sum.

    Args:
        node: the prefix ``w``; ``None`` if it is not stored.
        log_allowed: ``float64[V]``, ``log p(. | w)``, ``-inf`` for forbidden tokens.
    """
    scores = log_allowed.copy()
    if node is not None:
        for token, child in node.children.items():
            scores[token] += child.log_live
    return scores, min(0.0, logsumexp(scores))
