# SPDX-License-Identifier: Apache-2.0
"""How much to draft beside a target step, whether it really runs beside it, and whether it pays.

PEARL (arXiv 2408.11850) drafts gamma = c tokens beside each target step, where c is the ratio of
the two models' speeds. Both are measured here while the engine runs.
"""

from __future__ import annotations

import math


def chunk_length(target_seconds: float, draft_seconds: float, most: int) -> int:
    """How many draft passes fit beside a target step: the paper's speed ratio, at least 1.

    Args:
        target_seconds: of a step.
        draft_seconds: of a pass of the draft model, while the other runs beside it.
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
    """Notices whether drafting beside the target really runs beside it, and beats drafting in line.

    With a core too few the two share it, and a step with drafting beside it takes as long as both
    in turn. Of the times t of a step alone, d of drafting alone and b of both together, the share
    of the shorter one that is hidden is

        (t + d - b) / min(t, d)

    which is 1 for perfect overlap and 0 for none. And what was drafted beside a step is of use only
    if the step turns out as assumed: let that be so in a share h of steps, and let A be the tokens
    that a step with drafts accepts. Then per second a request gets

        (1 + h A) / b    beside,    (1 + A) / (t + d)    in line.

    Drafting stays beside the step while the hidden share is at least `WORTH` and the former rate is
    not below the latter, all by running means, and is tried again from time to time.

    Attributes:
        hidden: that share.
        slowdown: b - t, what the step loses to its neighbour, in seconds.
        hits: h.
        accepted: A.
    """

    WORTH = 0.25
    _MEMORY = 8.0
    _LONG_MEMORY = 32.0  # of what differs from step to step
    _FIRST = 4.0  # steps that the first values count for
    _RETRY = 256

    def __init__(self) -> None:
        self.hidden = 1.0
        self.slowdown = 0.0
        self.hits = 1.0
        self.accepted = 1.0
        self._judged = self._verified = self._FIRST
        self._beside_seconds = self._in_line_seconds = 0.0  # b, t + d
        self._waited = 0

    @property
    def beside(self) -> bool:
        """Whether to draft beside the next step (otherwise in line, after it)."""
        return (self.hidden >= self.WORTH and self.pays) or self._waited >= self._RETRY

    @property
    def pays(self) -> bool:
        """Whether a request gets at least as many tokens per second as in line."""
        beside = (1.0 + self.hits * self.accepted) * self._in_line_seconds
        return beside >= (1.0 + self.accepted) * self._beside_seconds

    def record(self, together: float, target_alone: float, draft_alone: float) -> None:
        """A step with drafting beside it took `together` seconds.

        Values that cannot be measurements (not positive, not finite) are ignored.
        """
        times = (together, target_alone, draft_alone)
        if not all(t > 0.0 and math.isfinite(t) for t in times):
            return
        self._waited = 0
        in_line = target_alone + draft_alone
        share = (in_line - together) / min(target_alone, draft_alone)
        self.hidden += (min(max(share, 0.0), 1.0) - self.hidden) / self._MEMORY
        self.slowdown += (max(together - target_alone, 0.0) - self.slowdown) / self._MEMORY
        memory = self._MEMORY if self._in_line_seconds else 1.0
        self._in_line_seconds += (in_line - self._in_line_seconds) / memory
        self._beside_seconds += (together - self._beside_seconds) / memory

    def judged(self, hit: bool) -> None:
        """A step turned out as it was assumed to beside it, or not."""
        self._judged = min(self._judged + 1.0, self._LONG_MEMORY)
        self.hits += (float(hit) - self.hits) / self._judged

    def verified(self, accepted: int) -> None:
        """A request's step with drafts accepted so many of them."""
        self._verified = min(self._verified + 1.0, self._LONG_MEMORY)
        self.accepted += (accepted - self.accepted) / self._verified

    def skipped(self) -> None:
        """A step was drafted in line."""
        self._waited += 1
