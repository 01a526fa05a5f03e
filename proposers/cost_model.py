# SPDX-License-Identifier: Apache-2.0
"""How long a step takes, learned from every step that runs.

    seconds = c(rows) + b * context + a * drafted + t * branching + o * verified

The terms are the work that every row costs, the attention of decoding, what attention to drafted
rows adds to it, and what is done outside the forward pass:

- c is a curve through anchor row counts, measured at start-up without attention;
- `context` sums over the requests the tokens that each attends to;
- `drafted` sums over the requests their drafted rows times their context;
- `branching` counts the trees with branches, which need an attention of their own;
- `verified` counts the rows that are sampled from or verified, and o, seconds for each, is measured
  by itself: one value for steps with drafts, which are walked, learnt from and drafted again, and
  one for steps without, which are sampled.

A long context makes a drafted row dear although c says that rows are cheap. Each step corrects all
terms but o by a share of its error (normalised least mean squares with clipped errors); o is a
running mean. Were it not kept apart, c would hold it, and as what all row counts have in common is
learned for all of them, plain steps would be believed to be slower than they are.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from proposers.step_cost import StepCost

_CLIP = 0.3
"""Largest log-ratio that one step may report: a pause of the machine is not a cost of rows."""

_RATE_SHARED = 0.02
_RATE_ANCHOR = 0.05
"""Step sizes for drift that all row counts share (load of the machine) and for one anchor's.

The second is the larger one, so that a wrong belief corrects itself: if steps of the size in use
turn out slow, sizes that are not in use must look better by comparison, or none would be tried.
"""

_PRIOR_STEPS = 6.0
"""Steps that the start-up measurement of an anchor counts for: the first steps teach more."""

_DOUBT = 0.05
_DOUBT_STEPS = 4.0
"""How much faster (log-ratio) than believed a row count may be that was seldom measured, compared
with the plain step, and the steps after which that is half believed. Without it, drafts that look a
little too dear at the start would never be tried.
"""

_RATE_CONTEXT = 0.02
_RATE_DRAFTED = 0.1
_MUCH_CONTEXT = 2048.0
_MUCH_DRAFTED = 4096.0
"""Step sizes for the attention terms, and the loads from which on a step says much about them.

An error of a step with little of either would be blown up when the term is used for much.
"""

_RATE_BRANCHING = 0.1
_MANY_BRANCHING = 2.0
"""As above, for trees with branches."""

_OUTSIDE_MEMORY = 32.0
"""Steps that the running mean of o looks back on."""

_FORGET = 1.0 / 2000.0
"""Per step, what is taken back of corrections other than the shared drift: what was learned about
sizes that are not in use any more returns to the measurements of the start, so that drafts which
did not pay in a busy hour are tried again.
"""


@dataclass(frozen=True, slots=True)
class AttentionCost:
    """Seconds of attention in a step, over all layers.

    Attributes:
        context: per token of context that a decoding request attends to.
        drafted: per drafted row and token of its context, on top.
        branching: per tree with branches, on top.

    Raises:
        ValueError: for a negative or infinite value.
    """

    context: float = 0.0
    drafted: float = 0.0
    branching: float = 0.0

    def __post_init__(self) -> None:
        for name in ("context", "drafted", "branching"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise ValueError(f"AttentionCost: {name}={value}; it must be finite and at least 0")


class CostModel(StepCost):
    """Latency of a step, by rows and by the context of its requests.

    Read without a context it gives c(rows) alone; `in_context` gives the latency of a batch.

    Measured times differ between the ranks of a tensor-parallel group, while their drafts must
    not: there, one rank measures and all of them `record` what it measured.

    Args:
        prior: pairs (rows, seconds) from a start-up measurement; rows distinct and at least 1.
        margin: how much better (relative) a step with drafts must promise to be than one without.
        attention: from a start-up measurement; without one it is learned.

    Raises:
        ValueError: if `prior` is empty, has a non-positive entry or repeats a row count.
    """

    def __init__(
        self,
        prior: Sequence[tuple[int, float]],
        *,
        margin: float = 0.02,
        attention: AttentionCost | None = None,
    ) -> None:
        points = sorted(prior)
        rows = [r for r, _ in points]
        if not points or len(set(rows)) != len(rows):
            raise ValueError(
                f"CostModel: prior={list(prior)}; give at least one (rows, seconds) pair and each "
                "row count once"
            )
        if rows[0] < 1 or not all(s > 0 and math.isfinite(s) for _, s in points):
            raise ValueError(
                f"CostModel: prior={list(prior)}; rows must be at least 1 and seconds positive"
            )
        if margin < 0:
            raise ValueError(f"CostModel: margin={margin}; it must not be negative")
        super().__init__(np.array(rows, np.float64), margin)
        self._anchor_rows = rows
        self._prior = np.log(np.array([s for _, s in points], np.float64))
        self._drift = 0.0  # of all anchors
        self._own = np.zeros(len(rows))  # of each
        self._steps = np.zeros(len(rows))  # that taught each, the old ones forgotten
        self._first = attention or AttentionCost()
        self.attention = self._first
        self._outside = {False: (0.0, 0.0), True: (0.0, 0.0)}  # o and its steps, by "has drafts"

    def record(
        self,
        rows: int,
        seconds: float,
        *,
        context: float = 0.0,
        drafted: float = 0.0,
        branching: int = 0,
        verified: int = 0,
        outside: float = 0.0,
        sampling: float = 0.0,
    ) -> None:
        """Correct the model by one step.

        Values that can't be a measurement (not positive, not finite) are ignored.

        Args:
            rows: of the step.
            seconds: that it took.
            context: tokens that its requests attended to.
            drafted: over its requests, drafted rows times context.
            branching: trees with branches.
            verified: rows that were sampled from or verified.
            outside: of `seconds`, what was not the forward pass: the walk, learning and drafting.
            sampling: of `outside`, what it would be if nobody drafted.
        """
        seconds -= outside
        loads = (seconds, context, drafted, branching, outside, sampling)
        if rows < 1 or not seconds > 0.0 or not all(0.0 <= x < math.inf for x in loads):
            return
        if rows == verified:  # no prompt, whose own work would be taken for that of its row
            mean, steps = self._outside[drafted > 0.0]
            rate = max(1.0 / (steps + 1.0), 1.0 / _OUTSIDE_MEMORY)
            each = (outside if drafted else sampling) / verified
            self._outside[drafted > 0.0] = mean + rate * (each - mean), steps + 1.0
        base = self.seconds(rows)
        per_context, per_drafted = self.attention.context, self.attention.drafted
        per_branching = self.attention.branching
        expected = base + per_context * context + per_drafted * drafted + per_branching * branching
        surprise = min(max(math.log(seconds / expected), -_CLIP), _CLIP)
        self._correct(rows, surprise * base / expected)
        error = expected * surprise
        per_context += _RATE_CONTEXT * error * context / (context**2 + _MUCH_CONTEXT**2)
        per_drafted += _RATE_DRAFTED * error * drafted / (drafted**2 + _MUCH_DRAFTED**2)
        per_branching += _RATE_BRANCHING * error * branching / (branching**2 + _MANY_BRANCHING**2)
        per_context += _FORGET * (self._first.context - per_context)
        per_drafted += _FORGET * (self._first.drafted - per_drafted)
        per_branching += _FORGET * (self._first.branching - per_branching)
        self.attention = AttentionCost(
            max(0.0, per_context), max(0.0, per_drafted), max(0.0, per_branching)
        )

    def steps(self, rows: int) -> float:
        """How many steps of about so many rows were recorded; those of long ago count less."""
        return float(sum(share * self._steps[anchor] for anchor, share in self._anchors(rows)))

    def in_context(self, base_rows: int, contexts: Sequence[int]) -> StepCost:
        """Latency of a batch whose requests attend to so many tokens each.

        A row beyond `base_rows` is taken for a drafted one, of a request of mean context.
        """
        total = float(sum(contexts))
        mean = total / max(1, len(contexts))
        plain, drafting = self.outside
        return _InContext(
            self,
            base_rows,
            fixed=self.attention.context * total + plain * len(contexts),
            per_node=self.attention.drafted * mean + drafting,
            drafting=(drafting - plain) * len(contexts),
        )

    @property
    def outside(self) -> tuple[float, float]:
        """o of steps without and with drafts; the second is at least the first."""
        plain, drafting = self._outside[False][0], self._outside[True][0]
        return plain, max(plain, drafting)

    def _correct(self, rows: int, surprise: float) -> None:
        """Move the curve at `rows` towards a logarithmic error."""
        self._drift += _RATE_SHARED * surprise
        self._own *= 1.0 - _FORGET
        self._steps *= 1.0 - _FORGET
        for anchor, share in self._anchors(rows):
            rate = max(_RATE_ANCHOR, 1.0 / (_PRIOR_STEPS + self._steps[anchor]))
            self._own[anchor] += rate * share * surprise
            self._steps[anchor] += share

    def _anchors(self, rows: int) -> list[tuple[int, float]]:
        """The anchors around a row count, with their shares in it."""
        at = self._anchor_rows
        right = min(bisect_left(at, rows), len(at) - 1)
        if at[right] <= rows or right == 0:
            return [(right, 1.0)]
        left = right - 1
        share = (rows - at[left]) / (at[right] - at[left])
        return [(left, 1.0 - share), (right, share)]

    def seconds(self, rows: int) -> float:
        """As the base class; every step asks, and one point needs no curve."""
        around = self._anchors(rows)
        last, _ = around[-1]
        if rows > self._anchor_rows[last]:
            return super().seconds(rows)
        logs = (self._prior + self._own + self._drift)[: last + 1].tolist()
        return sum(share * math.exp(max(logs[: anchor + 1])) for anchor, share in around)

    def _at(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        return _through(self._rows, np.exp(self._prior + self._own + self._drift), rows)

    def _hopeful(self, base_rows: int, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """As `_at`, with the benefit of the doubt for row counts above `base_rows`."""
        known = self._steps / (self._steps + _DOUBT_STEPS)
        steps = self.steps(base_rows)
        doubt = np.maximum(0.0, steps / (steps + _DOUBT_STEPS) - known)
        doubt[self._rows <= base_rows] = 0.0
        logs = self._prior + self._own + self._drift - _DOUBT * doubt
        return _through(self._rows, np.exp(logs), rows)


def _through(
    at: NDArray[np.float64], seconds: NDArray[np.float64], rows: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The curve through the anchors, made non-decreasing."""
    anchors = np.maximum.accumulate(seconds)
    curve: NDArray[np.float64] = np.interp(rows, at, anchors)
    if len(anchors) > 1:
        # Beyond the last anchor the curve goes on with the mean slope of the measured range.
        slope = (anchors[-1] - anchors[0]) / (at[-1] - at[0])
        curve += slope * np.maximum(rows - at[-1], 0.0)
    return curve


class _InContext(StepCost):
    """A cost model read for one batch; it follows what the model learns."""

    def __init__(
        self, model: CostModel, base_rows: int, *, fixed: float, per_node: float, drafting: float
    ) -> None:
        super().__init__(model._rows, model._margin)
        self._model = model
        self._base_rows = base_rows
        self._fixed = fixed
        self._per_node = per_node
        self._drafting = drafting  # of a step with any node
        self.branching = model.attention.branching

    def _at(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        nodes = np.maximum(rows - self._base_rows, 0.0)
        seconds = self._model._hopeful(self._base_rows, rows)
        return seconds + self._fixed + self._per_node * nodes + self._drafting * (nodes > 0.0)
