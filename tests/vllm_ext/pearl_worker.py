# SPDX-License-Identifier: Apache-2.0
"""A worker that drafts beside the target wherever it runs, and whose drafting can be broken."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from proposers.overlap import Overlap
from proposers.pearl import Pearl
from tests.vllm_ext.draft_worker import DraftWorker
from vllm_ext.worker import draft_predictor
from vllm_ext.worker.beside import BesideThread

T = TypeVar("T")

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
        if runner.place_beside is None:
            runner.place_beside = BesideThread(max(os.sched_getaffinity(0)))
        Overlap.WORTH = -1.0
        Overlap.pays = True  # type: ignore[assignment, method-assign]
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
            "core": runner.place_beside.core,
            "thread": sorted(runner._beside.submit(lambda: os.sched_getaffinity(0)).result()),
            "target": sorted(os.sched_getaffinity(0)),
        }


class SerialPlace:
    """Stands for a device's stream, on a CPU, whose kernels must not run side by side."""

    where = "in another thread, while the target waits within its pass"

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._waiting: Callable[[], None] | None = None

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Let `job` run when the target reaches its first layer; a rehearsal has no target."""
        if getattr(job, "__name__", "") == "rehearse":
            return self._pool.submit(job)
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(job())
            except Exception as error:
                future.set_exception(error)

        self._waiting = run
        return future

    def amid(self, *_: Any) -> None:
        """The target is at its first layer."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._pool.submit(waiting).result()

    def finish(self) -> None:
        """The target has ended, and had a first layer."""
        assert self._waiting is None


class StreamWorker(PearlWorker):
    """Passes of the draft model amid the target's as a GPU makes them, with stock attention."""

    def init_device(self) -> None:
        """As the base class, with another place."""
        super().init_device()
        self.model_runner.place_beside = SerialPlace()  # type: ignore[attr-defined]

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """As the base class, with a draft model that takes this for a GPU."""
        super().load_model(*args, **kwargs)
        runner: Any = self.model_runner
        runner._draft_model._on_cpu = False
        runner.model.model.layers[0].register_forward_pre_hook(runner.place_beside.amid)
