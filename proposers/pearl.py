# SPDX-License-Identifier: Apache-2.0
"""PEARL (arXiv 2408.11850): drafting beside verification, as a state machine of one request.

While the target verifies the tokens that were scheduled, the draft model goes on from them, as if
all were going to be accepted. A round is one target step; with x the committed text:

* PRE: nothing is scheduled but x's last token. Beside the step the draft proposes c_1 .. c_g, and
  the step's own token verifies c_1 before any other is verified (pre-verify). If they agree, c_2 ..
  c_g are scheduled next, already drafted: POST. If not, the proposals are dropped: PRE.
* POST: d_1 .. d_m are scheduled. Beside the step the draft proposes c_0 .. c_g behind them
  (post-verify): c_0 stands for the target's own token after d_m. If d_1 .. d_m are accepted and
  that token is c_0, then c_1 .. c_g are scheduled next: POST. Otherwise PRE.

So the draft length adapts by itself: a run of accepted tokens of any length is one uninterrupted
draft, and where the draft is wrong a step verifies nothing. The walk of this package emits the
target's own token at the end of each path, which the paper's rejection sampling does not after a
full acceptance; hence c_0. A proposal never changes what the target says, so the text is the
target's whatever is proposed.

The chunk length g is the number of draft passes that fit into a target step, measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum


class Phase(Enum):
    """What the running target step verifies."""

    PRE = "pre"
    POST = "post"


@dataclass(frozen=True, slots=True)
class Continuation:
    """What to draft beside a target step.

    Attributes:
        ticket: identifies the step; proposals for an older ticket are dropped.
        prefix: tokens behind the committed text that the draft takes for accepted.
        length: tokens to propose behind them.
    """

    ticket: int
    prefix: tuple[int, ...]
    length: int


@dataclass(slots=True)
class Tally:
    """Counts of one request.

    Attributes:
        rounds: target steps.
        emitted: tokens of the text.
        proposed: tokens that the draft made beside the steps.
        kept: of these, tokens that were scheduled or verified before it.
        longest: tokens of the longest uninterrupted draft that was accepted.
    """

    rounds: int = 0
    emitted: int = 0
    proposed: int = 0
    kept: int = 0
    longest: int = 0
    _run: int = field(default=0, repr=False)

    def extend_run(self, tokens: int, unbroken: bool) -> None:
        """Count accepted draft tokens of a round; the run goes on if nothing was wrong."""
        self._run += tokens
        self.longest = max(self.longest, self._run)
        if not unbroken:
            self._run = 0


class Pearl:
    """The machine. Per round: `begin`, the target step beside drafting, `finish`.

    Args:
        length: g, at least 1; may be changed between rounds.

    Raises:
        ValueError: for a length below 1.

    Attributes:
        scheduled: the tokens that the next target step verifies.
        tally: what happened so far.
    """

    def __init__(self, length: int) -> None:
        if length < 1:
            raise ValueError(f"Pearl: length={length}; it must be at least 1")
        self.length = length
        self.scheduled: tuple[int, ...] = ()
        self.tally = Tally()
        self._ticket = 0
        self._verified: tuple[int, ...] = ()
        self._running = False

    @property
    def phase(self) -> Phase:
        """What the next target step verifies."""
        return Phase.POST if self.scheduled else Phase.PRE

    def begin(self, limit: int | None = None) -> Continuation:
        """A target step starts.

        Args:
            limit: most tokens that the engine verifies in this step; the rest of what was scheduled
                is dropped. `None`: all of them.

        Returns:
            What to draft beside it.

        Raises:
            RuntimeError: if the last step was not finished.
        """
        if self._running:
            raise RuntimeError("Pearl: begin() before finish() of the step that is running")
        self._running = True
        self._ticket += 1
        cut = self.scheduled if limit is None else self.scheduled[:limit]
        self._verified = cut
        # After a drafted token the first proposal stands for the target's own one.
        return Continuation(self._ticket, cut, self.length + (1 if cut else 0))

    def finish(self, emitted: Sequence[int], proposal: Continuation, tokens: Sequence[int]) -> None:
        """The target step has ended.

        Args:
            emitted: what it added to the text: the accepted tokens and one of the target's own.
            proposal: what `begin` asked for.
            tokens: what the draft made of it, possibly less than was asked for or nothing.

        Raises:
            RuntimeError: if no step is running.
            ValueError: if `emitted` cannot come from verifying what was scheduled.
        """
        if not self._running:
            raise RuntimeError("Pearl: finish() without begin()")
        verified = self._verified
        if not 1 <= len(emitted) <= len(verified) + 1 or tuple(emitted[:-1]) != tuple(
            verified[: len(emitted) - 1]
        ):
            raise ValueError(
                f"Pearl: emitted {list(emitted)} after scheduling {list(verified)}; it must be a "
                "prefix of that and one more token"
            )
        self._running = False
        self.scheduled = ()
        tally = self.tally
        tally.rounds += 1
        tally.emitted += len(emitted)
        current = proposal.ticket == self._ticket
        tally.proposed += len(tokens)
        accepted = len(emitted) - 1
        agrees = current and accepted == len(verified) and bool(tokens) and tokens[0] == emitted[-1]
        if agrees:
            self.scheduled = tuple(tokens[1:])
            tally.kept += len(tokens)
        tally.extend_run(accepted + agrees, agrees)

    def abandon(self) -> None:
        """The request was preempted, or its text changed: whatever is under way is dropped."""
        self._ticket += 1
        self._running = False
        self._verified = ()
        self.scheduled = ()


def chunk_length(target_seconds: float, draft_seconds: float, most: int) -> int:
    """How many draft passes fit beside a target step: the paper's speed ratio, at least 1.

    Args:
        target_seconds: of a step.
        draft_seconds: of a pass over one token, both while the other runs beside it.
        most: upper bound.

    Raises:
        ValueError: if a time is not positive or `most` is below 1.
    """
    if not (target_seconds > 0.0 and draft_seconds > 0.0) or most < 1:
        raise ValueError(
            f"chunk_length: target_seconds={target_seconds}, draft_seconds={draft_seconds}, "
            f"most={most}; times must be positive and most at least 1"
        )
    return min(most, max(1, math.floor(target_seconds / draft_seconds)))


class Overlap:
    """Notices whether drafting beside the target really runs beside it.

    With a core too few the two share it, and a step with drafting beside it takes as long as both
    in turn. Of the times t of a step alone, d of drafting alone and b of both together, the share
    of the shorter one that is hidden is

        (t + d - b) / min(t, d)

    which is 1 for perfect overlap and 0 for none. Drafting stays beside the step while the running
    mean is at least `WORTH`, and is tried again from time to time.
    """

    WORTH = 0.25
    _MEMORY = 8.0
    _RETRY = 256

    def __init__(self) -> None:
        self.hidden = 1.0
        self._waited = 0

    @property
    def beside(self) -> bool:
        """Whether to draft beside the next step (otherwise in line, after it)."""
        return self.hidden >= self.WORTH or self._waited >= self._RETRY

    def record(self, together: float, target_alone: float, draft_alone: float) -> None:
        """A step with drafting beside it took `together` seconds.

        Values that cannot be measurements (not positive, not finite) are ignored.
        """
        times = (together, target_alone, draft_alone)
        if not all(t > 0.0 and math.isfinite(t) for t in times):
            return
        self._waited = 0
        share = (target_alone + draft_alone - together) / min(target_alone, draft_alone)
        self.hidden += (min(max(share, 0.0), 1.0) - self.hidden) / self._MEMORY

    def skipped(self) -> None:
        """A step was drafted in line."""
        self._waited += 1
