# SPDX-License-Identifier: Apache-2.0
"""The token tree: what a proposer hands to the engine for one request and one step.

A tree holds guesses for the tokens after the last committed one (the root, which is not stored).
Nodes come in best-first order with every parent before its children, so cutting the sequence
anywhere leaves a tree: the scheduler may truncate a draft without knowing that it branches.
The ancestor relation is the attention mask of tree verification (SpecInfer, arXiv 2305.09781).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

ROOT = -1
"""Index of the root: the parent of the nodes at depth 1."""


@dataclass(frozen=True, slots=True)
class TokenTree:
    """N drafted tokens of one request; the root is the last committed token and is not a node.

    Attributes:
        tokens: N token ids.
        parents: N indices of parent nodes, ``ROOT`` (-1) for the children of the root.
        probs: N estimates of the probability that the whole path from the root is accepted.

    The constructor checks nothing, because it runs in every step; `validate` does.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    probs: tuple[float, ...]

    EMPTY: ClassVar[TokenTree]

    @classmethod
    def chain(cls, tokens: Sequence[int], probs: Sequence[float]) -> TokenTree:
        """A tree without branches: each token follows the one before it."""
        return cls(tuple(tokens), tuple(range(-1, len(tokens) - 1)), tuple(probs))

    def __len__(self) -> int:
        return len(self.tokens)

    def validate(self) -> None:
        """Check the invariants of the class.

        Raises:
            ValueError: naming the node and the rule that it breaks.
        """
        lengths = len(self.tokens), len(self.parents), len(self.probs)
        if len(set(lengths)) != 1:
            raise ValueError(
                f"TokenTree: tokens, parents and probs have lengths {lengths}; give equal lengths"
            )
        siblings: set[tuple[int, int]] = set()
        for node, (token, parent, prob) in enumerate(
            zip(self.tokens, self.parents, self.probs, strict=True)
        ):
            if not ROOT <= parent < node:
                raise ValueError(
                    f"TokenTree: node {node} has parent {parent}; a parent is an earlier node "
                    f"or {ROOT} for the root"
                )
            limit = 1.0 if parent == ROOT else self.probs[parent]
            if not 0.0 <= prob <= limit:
                raise ValueError(
                    f"TokenTree: node {node} has path probability {prob}; it must lie between 0 "
                    f"and its parent's {limit}"
                )
            if (parent, token) in siblings:
                raise ValueError(
                    f"TokenTree: node {node} repeats token {token} under parent {parent}; "
                    "siblings need distinct tokens"
                )
            siblings.add((parent, token))

    def prefix(self, n: int) -> TokenTree:
        """The tree of the first ``n`` nodes (all of them when there are fewer)."""
        if n >= len(self.tokens):
            return self
        return TokenTree(self.tokens[:n], self.parents[:n], self.probs[:n])

    def pruned(self, keep: Sequence[bool]) -> TokenTree:
        """The tree of the nodes marked in ``keep``; a kept node's parent must be kept too."""
        nodes = [node for node, kept in enumerate(keep) if kept]
        if len(nodes) == len(self.tokens):
            return self
        place = {node: at for at, node in enumerate(nodes)} | {ROOT: ROOT}
        return TokenTree(
            tuple(self.tokens[node] for node in nodes),
            tuple(place[self.parents[node]] for node in nodes),
            tuple(self.probs[node] for node in nodes),
        )

    @property
    def depths(self) -> tuple[int, ...]:
        """N distances from the root; its children have depth 1."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return tuple(depths)

    @property
    def is_chain(self) -> bool:
        """Whether every node follows the one before it (true for an empty tree)."""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    @property
    def children(self) -> dict[int, dict[int, int]]:
        """For every node and for ``ROOT``: its children as a map from token to node."""
        children: dict[int, dict[int, int]] = {node: {} for node in range(ROOT, len(self.tokens))}
        for node, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            children[parent][token] = node
        return children

    def ancestors(self) -> NDArray[np.bool_]:
        """Bool [N, N]: entry (i, j) says that node j lies on the path from the root to node i.

        Every node sees itself. The root and the committed context are visible to all nodes and
        have no column.
        """
        seen = np.eye(len(self.tokens), dtype=np.bool_)
        for node, parent in enumerate(self.parents):
            if parent != ROOT:
                seen[node] |= seen[parent]
        return seen


TokenTree.EMPTY = TokenTree((), (), ())
