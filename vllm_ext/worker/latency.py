# SPDX-License-Identifier: Apache-2.0
"""Measures what a step costs, for the cost model."""

from __future__ import annotations

import time
from collections.abc import Sequence

from proposers.cost_model import AttentionCost, CostModel

_IDLE_SECONDS = 0.05
"""A longer pause between steps is the engine waiting for work, not part of a step."""


class _FreeOfCharge(CostModel):
    """Every row costs the same: trees as large as the options allow (``adaptive=false``)."""

    def __init__(self) -> None:
        super().__init__([(1, 1.0)], margin=0.0)

    def record(self, rows: int, seconds: float, **loads: float) -> None:
        """Ignore the measurement."""


class StepTimer:
    """Times engine steps from the start of one forward pass to the start of the next.

    So a step's cost contains the scheduler, the messages between processes and the drafting, which
    amortise over the tokens that a step yields.
    """

    def __init__(self) -> None:
        self.cost: CostModel = _FreeOfCharge()
        self._rows = 0
        self._loads: dict[str, int] = {}
        self._begin = 0.0
        self._end = 0.0
        self._excluded = 0.0
        self._outside = self._sampling = 0.0

    def start(
        self, prior: list[tuple[int, float]], attention: AttentionCost, *, adaptive: bool
    ) -> None:
        """Begin to record.

        Args:
            prior: measured (rows, seconds) of the forward pass, without attention.
            attention: measured beside it.
            adaptive: whether trees are sized by cost at all.
        """
        if adaptive:
            self.cost = CostModel(prior, attention=attention)

    def begin(self, rows: int) -> None:
        """A step of ``rows`` rows starts; the previous one, if it was back to back, is recorded."""
        now = time.perf_counter()
        if self._rows and self._end and now - self._end < _IDLE_SECONDS:
            self.cost.record(
                self._rows,
                now - self._begin - self._excluded,
                outside=max(0.0, self._outside - self._excluded),
                sampling=self._sampling,
                **self._loads,
            )
        self._loads = {}
        self._rows, self._begin, self._end = rows, now, 0.0
        self._excluded = self._outside = self._sampling = 0.0

    def attend(self, contexts: Sequence[int], nodes: Sequence[int], branching: int) -> None:
        """Tell what the step attends to: per request, its context and its drafted rows; and how
        many trees have branches.
        """
        self._loads = {
            "context": sum(contexts),
            "drafted": sum(c * n for c, n in zip(contexts, nodes, strict=True)),
            "verified": len(contexts) + sum(nodes),
            "branching": branching,
        }

    def work_outside(self, seconds: float, *, sampling: float = 0.0) -> None:
        """Time of the step outside the forward pass: the walk, learning and drafting.

        Args:
            seconds: all of it; the passes of a draft model in it are told to `exclude` too.
            sampling: the part that a step takes where nobody drafts.
        """
        self._outside += seconds
        self._sampling += sampling

    def exclude(self, seconds: float) -> None:
        """Part of the step that has a cost model of its own: the passes of a draft model."""
        self._excluded += seconds

    def end(self) -> None:
        """The step's tokens and drafts are known."""
        self._end = time.perf_counter()
