# SPDX-License-Identifier: Apache-2.0
"""A worker that drafts beside the target wherever it runs, and whose drafting can be broken."""

from __future__ import annotations

import os
from typing import Any

from proposers.overlap import Overlap
from proposers.pearl import Pearl
from tests.vllm_ext.draft_worker import DraftWorker
from vllm_ext.worker import draft_predictor

ORIGINALS: dict[str, Any] = {
    "plan": Pearl.plan,
    "settle": draft_predictor.DraftPredictor.settle,
}


def _trusting(self: Any, kept: Any) -> None:
    ORIGINALS["settle"](self, {name: len(self._assumed[name][1]) for name in kept})


def _raising(*args: Any) -> Any:
    raise RuntimeError("broken on purpose")


def _patient(self: Any, trees: Any, seconds: float) -> bool:
    """As if every step were long enough: a target that drafts for itself is never fast enough."""
    return bool(ORIGINALS["plan"](self, trees, 1e9))


class PearlWorker(DraftWorker):
    """On machines with one core, too, and however little is hidden there."""

    def init_device(self) -> None:
        """Give the drafting thread a core, if need be the target's."""
        super().init_device()
        runner: Any = self.model_runner
        if runner.spare_core is None:
            runner.spare_core = max(os.sched_getaffinity(0))
        Overlap.WORTH = -1.0
        Pearl.plan = _patient  # type: ignore[method-assign]

    def break_pearl(self, name: str) -> None:
        """Break one thing; ``none`` repairs everything."""
        predictor: Any = draft_predictor.DraftPredictor
        predictor.settle = ORIGINALS["settle"]
        if name == "settle":
            predictor.settle = _trusting
        elif name == "pass":
            self.model_runner._draft_model._forward = _raising  # type: ignore[attr-defined]
        elif name != "none":
            raise ValueError(name)

    def where_drafted(self) -> dict[str, Any]:
        """The drafting thread's core and affinity, and the target's."""
        runner: Any = self.model_runner
        return {
            "core": runner.spare_core,
            "thread": sorted(runner._beside.submit(lambda: os.sched_getaffinity(0)).result()),
            "target": sorted(os.sched_getaffinity(0)),
        }
