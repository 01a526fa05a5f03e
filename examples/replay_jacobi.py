# SPDX-License-Identifier: Apache-2.0
"""Would speculative Jacobi decoding (arXiv 2410.01699) help? Counted during a replay.

At a rejected node the target still says what would follow it. Jacobi iteration takes that as the
guess for the same position of the next step: the token after the one that was emitted in the
rejected node's place. What counts is how often that guess is right where the tree of the next step
does not hold the token anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from proposers import TokenTree


@dataclass(slots=True)
class JacobiCount:
    """Steps that had a rejected node to guess from, and what the guesses were worth."""

    steps: int = 0
    first: int = 0
    among_three: int = 0
    in_tree: int = 0
    only_jacobi: int = 0
    _guess: list[int] = field(default_factory=list)

    def look(
        self, tree: TokenTree, path: Sequence[int], rows: Sequence[Any], future: Sequence[int]
    ) -> None:
        """Compare the guess from the last step with this one, and make the next.

        Args:
            tree: of this step.
            path: its accepted nodes.
            rows: the target's candidates per node, or `None`.
            future: the true tokens from this step on.
        """
        if self._guess and future:
            truth = future[0]
            children = [t for t, p in zip(tree.tokens, tree.parents, strict=True) if p < 0]
            self.steps += 1
            self.first += self._guess[0] == truth
            self.among_three += truth in self._guess[:3]
            self.in_tree += truth in children
            self.only_jacobi += truth in self._guess[:3] and truth not in children
        last = path[-1] if path else -1
        rejected = (n for n, p in enumerate(tree.parents) if p == last and rows[n] is not None)
        best = next(rejected, None)
        self._guess = list(rows[best][0]) if best is not None else []

    def forget(self) -> None:
        """Another request begins."""
        self._guess = []

    def __str__(self) -> str:
        def share(count: int) -> str:
            return f"{100 * count / max(self.steps, 1):.1f}%"

        return (
            f"Jacobi over {self.steps} steps: the guess is right in {share(self.first)}, among the "
            f"best three in {share(self.among_three)}; the next tree holds the token in "
            f"{share(self.in_tree)}; only the three guesses hold it in {share(self.only_jacobi)}"
        )
