# SPDX-License-Identifier: Apache-2.0
"""How much to draft beside a target step, and whether it really runs beside it.

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
    """Notices whether drafting beside the target really runs beside it.

    With a core too few the two share it, and a step with drafting beside it takes as long as both
    in turn. Of the times t of a step alone, d of drafting alone and b of both together, the share
    of the shorter one that is hidden is

        (t + d - b) / min(t, d)

    which is 1 for perfect overlap and 0 for none. Drafting stays beside the step while the running
    mean is at least `WORTH`, and is tried again from time to time.

    Attributes:
        hidden: that running mean.
        slowdown: running mean of b - t, what the step loses to its neighbour, in seconds.
    """

    WORTH = 0.25
    _MEMORY = 8.0
    _RETRY = 256

    def __init__(self) -> None:
        self.hidden = 1.0
        self.slowdown = 0.0
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
        self.slowdown += (max(together - target_alone, 0.0) - self.slowdown) / self._MEMORY

    def skipped(self) -> None:
        """A step was drafted in line."""
        self._waited += 1
