# SPDX-License-Identifier: Apache-2.0
"""Verification of a sampled tree, node by node from the root.

A rule turns the target's law at a node and the tokens drawn there into one token that has exactly
the target's law and is among the drawn ones as often as the rule can make it (`verify_swor.swor`,
`verify_kseq.kseq`). The walk emits that token and goes on at the child that holds it. The draws
below a node are independent of everything decided above it, so by induction the emitted tokens have
the target's joint law. It also goes on where a rule rejected all draws and then drew one of their
tokens from its residual, which k-SEQ may do.

The caller computes the target's rows: a verification says which node's row it needs next, and an
engine can run those of a batch in step, with one pass of its sampling pipeline per level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from proposers.chance import Chance
from proposers.law import DraftLaw, Law, Row, normalised
from proposers.sampled_tree import SampledTree
from proposers.tree import ROOT

Rule: TypeAlias = Callable[[Law, DraftLaw, Sequence[int], Chance], int]
"""(target law, draft law, drawn tokens in order, chance) to a token with the target's law."""


class Verification(Protocol):
    """One request's verification while it runs.

    Attributes:
        node: the node whose target row is needed next, its parent's was before; ``None`` at the
            end, before which `tokens` and `path` may be incomplete.
        tokens: emitted tokens, at least one.
        path: accepted nodes that have rows, one fewer than the tokens.
    """

    node: int | None
    tokens: list[int]
    path: list[int]

    def feed(self, row: Row) -> None:
        """Take the target's law after `node`, as its sampler would draw from it."""


class TreeWalk:
    """The walk of this module; see `Verification`.

    Args:
        tree: what was drafted.
        rule: fits the way in which the children were drawn.
        chance: decisions independent of the drafting.
        rows: how many nodes have a target row, the first ones of the tree; all by default.
    """

    def __init__(
        self, tree: SampledTree, rule: Rule, chance: Chance, *, rows: int | None = None
    ) -> None:
        self.node: int | None = ROOT
        self.tokens: list[int] = []
        self.path: list[int] = []
        self._tree = tree
        self._rule = rule
        self._chance = chance
        self._rows = len(tree) if rows is None else rows

    def feed(self, row: Row) -> None:
        """See `Verification.feed`.

        Raises:
            ValueError: if the walk has ended, or the row is no law.
        """
        if self.node is None:
            raise ValueError("TreeWalk.feed: the walk has ended; it takes no further row")
        p, tree = normalised(row), self._tree
        children = tree.draws.get(self.node, [])
        drawn = [tree.tokens[child] for child in children]
        if drawn:
            token = self._rule(p, tree.laws[self.node], drawn, self._chance)
        else:
            token = self._chance.draw(p)
        self.tokens.append(token)
        child = children[drawn.index(token)] if token in drawn else self._rows
        if child < self._rows:
            self.path.append(child)
            self.node = child
        else:
            self.node = None


def verify(verification: Verification, target: Callable[[int], Row]) -> None:
    """Run a verification to its end; `target` gives the row of a node, of ``ROOT`` first."""
    while verification.node is not None:
        verification.feed(target(verification.node))
