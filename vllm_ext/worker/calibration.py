# SPDX-License-Identifier: Apache-2.0
"""What a step costs by rows, timed at start-up with dummy tokens."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from vllm.distributed import get_tp_group

from vllm_ext.worker.drafting import candidates

_CALIBRATION_ROUNDS = 5
_SURE_ROUNDS = 2  # the first may compile or warm up
_SECONDS_PER_COUNT = 0.5
_LONGEST_PASS = 1.0
"""Start-up time: more rounds of a row count only within the former, and no larger count once a pass
takes longer than the latter; what lies beyond follows the mean slope.
"""


class CalibrationMixin:
    """Goes before a V1 runner class in the bases of a subclass."""

    def measure_forward(self: Any, row_counts: Sequence[int]) -> list[tuple[int, float]]:
        """Seconds of a forward pass over dummy tokens, logits included, by row count.

        The best of several rounds over all counts: a busy moment of the machine then hits every
        count, not one of them, and cannot make rows look free. Large counts have fewer rounds.
        """
        most = min(self.max_num_tokens, self.max_num_reqs * (1 + self.num_spec_tokens))
        best: dict[int, float] = {}
        for done in range(_CALIBRATION_ROUNDS):
            for rows in [rows for rows in row_counts if rows <= most]:
                if not self._agreed(_worth_measuring(best, rows, done)):
                    continue
                begin = time.perf_counter()
                hidden, _ = self._dummy_run(rows)
                logits = None
                if self.lora_config is None:  # a dummy run maps adapters to requests, not to rows
                    logits = self.model.compute_logits(hidden[:rows])
                self._sync_device()
                taken = time.perf_counter() - begin
                if logits is not None and not best:
                    candidates(logits)  # compiled, or loaded, before the first request comes
                best[rows] = min(best.get(rows, taken), taken)
        return list(best.items())

    def _agreed(self, here: bool) -> bool:
        """What rank 0 decides: clocks differ between ranks, and a pass needs all of them."""
        group = get_tp_group()
        return here if group.world_size == 1 else bool(group.broadcast_object(here, src=0))


def _worth_measuring(best: Mapping[int, float], rows: int, done: int) -> bool:
    """Whether to time a pass of ``rows`` rows, given the best times in ``done`` rounds so far."""
    if rows not in best:
        return done == 0 and max(best.values(), default=0.0) <= _LONGEST_PASS
    return done < _SURE_ROUNDS or (done + 1) * best[rows] <= _SECONDS_PER_COUNT
