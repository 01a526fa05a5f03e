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

    def record(
        self, rows: int, seconds: float, *, context: float = 0.0, drafted: float = 0.0
    ) -> None:
        """Ignore the measurement."""


class StepTimer:
    """Times engine steps from the start of one forward pass to the start of the next.

    So a step's cost contains the scheduler, the messages between processes and the drafting, which
    amortise over the tokens that a step yields.
    """

    def __init__(self) -> None:
        self.cost: CostModel = _FreeOfCharge()
        self._rows = 0
        self._context = self._drafted = 0
        self._begin = 0.0
        self._end = 0.0
        self._excluded = 0.0

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
                context=self._context,
                drafted=self._drafted,
            )
        self._context = self._drafted = 0
        self._rows, self._begin, self._end, self._excluded = rows, now, 0.0, 0.0

    def attend(self, contexts: Sequence[int], nodes: Sequence[int]) -> None:
        """Tell what the step attends to: per request, its context and its drafted rows."""
        self._context = sum(contexts)
        self._drafted = sum(c * n for c, n in zip(contexts, nodes, strict=True))

    def exclude(self, seconds: float) -> None:
        """Part of the step that has a cost model of its own: the passes of a draft model."""
        self._excluded += seconds

    def end(self) -> None:
        """The step's tokens and drafts are known."""
        self._end = time.perf_counter()
