# SPDX-License-Identifier: Apache-2.0
"""How wide and how deep to draw a tree, decided before the first token of it is drawn.

The cost model cuts a named tree where its nodes stop paying. Drawn nodes may not be cut for what
came out (see `proposers.sampled_tree`), so here the size follows from *expected* acceptance. Let a
be the probability that a draw is accepted when its turn comes, learned from verified trees. A node
with k draws then goes on with g(k) = 1 - (1 - a)^k, and with W nodes on each of d levels a request
gains

    E(W, d) = g(W) (1 + g(m) + ... + g(m)^(d-1)),    m = 1 + s (W - 1),

since of the W draws of a deeper level only some lie below the accepted node; the share s is learned
too. Trees that are drawn otherwise promise what their grower knows, or this for want of better; how
much of what was promised has come true is the last thing learned, and scales the promises. Chosen
are the W and d with the most expected tokens per second, the passes of the draft model included, if
any are better than no draft.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from proposers.step_cost import StepCost

_MEMORY = 64.0  # verified trees; a request's temperature and topic change what is accepted
_FIRST_ACCEPTANCE = 0.7
_FIRST_SHARE = 0.3
_LEAST = 0.01
_PRIOR = 4.0  # draws that the first values count for, however long ago the last tree was


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of the trees of one step.

    Attributes:
        width: nodes per level, 0 for no tree.
        depth: levels.
    """

    width: int
    depth: int


NO_TREE = Shape(0, 0)


class _Share:
    """A mean that forgets, and returns to its first value when nothing is learned."""

    def __init__(self, first: float) -> None:
        self._first = first
        self._hits = self._count = 0.0

    def add(self, hits: float, count: float) -> None:
        self._hits += hits
        self._count += count

    def forget(self) -> None:
        keep = 1.0 - 1.0 / _MEMORY
        self._hits *= keep
        self._count *= keep

    @property
    def value(self) -> float:
        return (self._hits + _PRIOR * self._first) / (self._count + _PRIOR)


class AcceptanceByRank:
    """How often the r-th draw at a node is the one accepted, for `sequoia.OptimalTemplates`.

    Learned is how often a draw is accepted *when its turn comes*, that is when those before it were
    rejected. A rank that never had its turn is taken for a good one, so that it gets one.

    Args:
        ranks: most draws at a node.
    """

    def __init__(self, ranks: int) -> None:
        self._shares = [_Share(_FIRST_ACCEPTANCE) for _ in range(ranks)]

    @property
    def values(self) -> tuple[float, ...]:
        """By rank; the sum is at most 1, and ranks behind the last one worth a node are left out.

        Acceptance in turn is rounded to twentieths, and never below one, so that a shape lasts.
        """
        found, rejected = [], 1.0
        for share in self._shares:
            accepted = max(1, round(20.0 * share.value)) / 20.0
            if rejected * accepted < _LEAST:
                break
            found.append(rejected * accepted)
            rejected *= 1.0 - accepted
        return tuple(found)

    def learn(self, tried: int, accepted: bool) -> None:
        """Tell what became of the draws at one visited node.

        Args:
            tried: how many had their turn.
            accepted: whether the last of them was accepted.
        """
        for rank, share in enumerate(self._shares[:tried], 1):
            share.add(float(accepted and rank == tried), 1.0)

    def forget(self) -> None:
        """A step has passed."""
        for share in self._shares:
            share.forget()


class SizeByExpectation:
    """Chooses shapes and learns from what became of them.

    Args:
        widths: that may be chosen.
        max_depth: most levels.
    """

    def __init__(self, widths: Sequence[int], max_depth: int) -> None:
        self._widths = tuple(widths)
        self._max_depth = max_depth
        self._acceptance = _Share(_FIRST_ACCEPTANCE)
        self._share = _Share(_FIRST_SHARE)
        self._kept = _Share(1.0)

    def choose(
        self,
        cost: StepCost,
        seconds: Callable[[int], float],
        *,
        base_rows: int,
        base_tokens: float,
        requests: int,
        size: int,
        debt: int,
        promise: Callable[[int, int], float] | None = None,
    ) -> tuple[Shape, float]:
        """The best shape for a step.

        Args:
            cost: of the target, by rows.
            seconds: of a pass of the draft model, by rows.
            base_rows: rows of the step without these trees.
            base_tokens: tokens that it yields.
            requests: number of trees, at least 1.
            size: most nodes of a tree.
            debt: rows that the draft model must read before it can predict.
            promise: what a tree of a width and a depth adds to a step, if not `expected`.

        Returns:
            The shape, and its gain in tokens per second relative to no tree; ``NO_TREE`` and 0 if
            no shape gains.
        """
        best, best_gain = NO_TREE, 0.0
        latency = cost.curve(base_rows + requests * max(size, 0)).tolist()
        reading = seconds(max(1, debt))
        promise = promise or self.expected
        for width in self._widths:
            level = seconds(requests * width)
            for depth in range(1, min(self._max_depth, size // width) + 1):
                tokens = base_tokens + requests * self._kept.value * promise(width, depth)
                spent = latency[base_rows + requests * width * depth] + reading
                spent += (depth - 1) * level
                gain = tokens / base_tokens * latency[base_rows] / spent - 1.0
                if gain > best_gain:
                    best, best_gain = Shape(width, depth), gain
        return best, best_gain

    def expected(self, width: int, depth: int) -> float:
        """Tokens that a tree of this shape adds to a step, on average: E(W, d)."""
        rejected = 1.0 - self._acceptance.value
        deeper = 1.0 - rejected ** (1.0 + self._share.value * (width - 1))
        first = 1.0 - rejected**width
        return float(first * sum(deeper**level for level in range(depth)))

    def learn(self, tried: int, accepted: bool, *, width: int, level: int, draws: int) -> None:
        """Tell what became of the draws at one visited node.

        Args:
            tried: how many had their turn.
            accepted: whether the last of them was accepted.
            width: of the tree.
            level: of the node, 0 for the root.
            draws: made at the node.
        """
        self._acceptance.add(float(accepted), tried)
        if level and width > 1:
            self._share.add(max(0, min(draws, width) - 1), width - 1)

    def settle(self, promised: float, accepted: int) -> None:
        """Tell how many nodes of a verified tree were accepted, and how many it promised."""
        self._kept.add(accepted, promised)

    def forget(self) -> None:
        """A step has passed; call once per step, so that a pause ends in another try."""
        self._kept.forget()
        self._acceptance.forget()
        self._share.forget()
