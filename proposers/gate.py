# SPDX-License-Identifier: Apache-2.0
"""Whether to draft at all: a switch with hysteresis over what drafts promise.

The cost model decides step by step, on measured and therefore noisy latencies. Near break-even it
would switch back and forth, paying for drafting without gaining from drafts. The gate looks at the
running mean g of the promised relative gain,

    closed -> open    when g >= OPEN_AT
    open   -> closed  when g <  CLOSE_AT < OPEN_AT

after DOUBT (1 - 1 / rows) was taken from every promise, and a closed gate asks for a trial draft
every `PROBE_EVERY` steps only, so that a server under load spends nothing on drafts that do not
pay. The pause doubles with every trial that fails, up to a limit, which is higher where a trial
itself is dear: a pass of a draft model.

An open gate leaves a draft out now and then, so that steps without drafts are measured too:
otherwise drafts could lose for ever to a plain step that is believed to be slower than it is. The
pause doubles with every `CHECKS_TO_DOUBLE` such steps that were measured.
"""

from __future__ import annotations

OPEN_AT = 0.02
CLOSE_AT = 0.005
DOUBT = 0.07
"""What is taken from a promise in a large batch: requests that are guessed well leave it to those
that are not, so a group that starts together gains less than its mean request is promised.
"""
PROBE_EVERY = 8
SELDOM = 16
"""Longest pause between trials; under load that is about a second."""
RARELY = 64
"""Patience where a trial costs a pass of a draft model: about 1% of a pass per step is left."""

CHECK_EVERY = 4
CHECKS_TO_DOUBLE = 3
_LONGEST_CHECK_PAUSE = 256

_MEMORY_OPEN = 32.0
_MEMORY_CLOSED = 3.0


class Gate:
    """Open at first, with the benefit of the doubt.

    Args:
        patience: longest pause between trials, in steps.
        is_open: at first; a closed one asks for its first trial at once.

    Attributes:
        is_open: whether drafts are used.
        gain: the running mean g.
        switches: how often that has changed.
    """

    def __init__(self, *, patience: int = SELDOM, is_open: bool = True) -> None:
        self.is_open = is_open
        self.switches = 0
        self._patience = patience
        self._pause = PROBE_EVERY
        self.gain = OPEN_AT
        self._rows = 0
        self._waited = 0
        self._unchecked = 0

    def wants_draft(self, base_rows: int, measured: float | None = None) -> bool:
        """Whether to grow trees for a step of `base_rows` rows besides the drafts.

        A batch that has halved or doubled since the last decision is another question: its first
        step is always tried.

        Args:
            base_rows: of the step.
            measured: steps of so many rows that were measured lately, if those without drafts have
                to be measured.
        """
        if self.is_open:
            self._unchecked += 1
            if measured is None or self._unchecked < _check_pause(measured):
                return True
            self._unchecked = 0
            return False
        self._waited += 1
        return self._changed(base_rows) or self._waited >= self._pause

    def decide(self, gain: float, base_rows: int) -> bool:
        """Take the promised gain of the trees that were grown (0 if no node pays).

        Args:
            gain: expected of them, as `StepCost.gain`.
            base_rows: as in `wants_draft`.

        Returns:
            Whether to use the trees.
        """
        if self.is_open or self._changed(base_rows):
            self._pause = PROBE_EVERY
        else:
            self._pause = min(2 * self._pause, self._patience)
        self._rows, self._waited = base_rows, 0
        memory = _MEMORY_OPEN if self.is_open else _MEMORY_CLOSED
        self.gain += (gain - DOUBT * (1.0 - 1.0 / base_rows) - self.gain) / memory
        if self.gain < CLOSE_AT if self.is_open else self.gain >= OPEN_AT:
            self.is_open = not self.is_open
            self.switches += 1
        return self.is_open

    def _changed(self, base_rows: int) -> bool:
        """Whether the batch is another one than at the last decision."""
        return not self._rows / 2 < base_rows < self._rows * 2


def _check_pause(measured: float) -> float:
    doubled = float(2.0 ** min(measured / CHECKS_TO_DOUBLE, 10.0))
    return min(CHECK_EVERY * doubled, _LONGEST_CHECK_PAUSE)
