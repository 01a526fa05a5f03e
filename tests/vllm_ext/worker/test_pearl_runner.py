# SPDX-License-Identifier: Apache-2.0
"""The runner's side of PEARL: the thread ends with the target's pass, whatever happens."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

forward_context = pytest.importorskip("vllm.forward_context")
if not hasattr(os, "sched_getaffinity"):
    pytest.skip("no affinity on this system", allow_module_level=True)

from vllm.config import VllmConfig  # noqa: E402

from proposers.cost_model import CostModel  # noqa: E402
from proposers.overlap import Overlap  # noqa: E402
from proposers.pearl import Tally  # noqa: E402
from proposers.tree import TokenTree  # noqa: E402
from tests.vllm_ext.logs import logged  # noqa: E402
from vllm_ext.method_options import PearlConfig  # noqa: E402
from vllm_ext.worker.beside import BesideThread, own_context  # noqa: E402
from vllm_ext.worker.draft_runner import DraftModelMixin  # noqa: E402
from vllm_ext.worker.pearl_runner import PearlMixin  # noqa: E402
from vllm_ext.worker.trace import Trace  # noqa: E402


class FakePearl:
    """Plans as it is told and notes what happens."""

    def __init__(self, draft: Callable[[Callable[[], bool]], float], planned: bool = True) -> None:
        self.overlap: Overlap | None = Overlap()
        self.tally = Tally(steps=2, passes=5, requests=3, hits=1)
        self.draft = draft
        self.planned = planned
        self.plans: list[tuple[dict[str, TokenTree], float]] = []
        self.settled: list[Any] = []

    def plan(self, trees: dict[str, TokenTree], seconds: float) -> bool:
        self.plans.append((trees, seconds))
        return self.planned

    def settle(self, emitted: Any) -> None:
        self.settled.append(emitted)


class Base:
    """The stock runner."""

    target: Callable[[], str] = staticmethod(lambda: "hidden")

    def _model_forward(self, *args: Any, **kwargs: Any) -> str:
        return self.target()


class Runner(PearlMixin, Base):  # type: ignore[misc]
    def __init__(self, pearl: FakePearl, thread: BesideThread) -> None:
        self._pearl = pearl  # type: ignore[assignment]
        self._beside = thread
        self._alone = CostModel([(1, 0.25), (4, 0.5)])
        self._trace = Trace(None)
        self._step = SimpleNamespace(trees=[TokenTree.chain([5], [0.5]), TokenTree.EMPTY])
        self.input_batch = SimpleNamespace(req_ids=["a", "b"], num_reqs=2)
        self.query_start_loc = SimpleNamespace(np=np.array([0, 2, 4]))
        self.counts: dict[str, float] = {}
        self._counters = SimpleNamespace(add=self.counts.__setitem__)


@pytest.fixture(scope="module")
def thread() -> BesideThread:
    return BesideThread(max(os.sched_getaffinity(0)))


@pytest.fixture(autouse=True)
def context() -> Iterator[None]:
    with forward_context.override_forward_context(SimpleNamespace(attn_metadata=None)):
        yield


def test_drafting_ends_when_the_target_has(thread: BesideThread) -> None:
    seen = []

    def draft(stopped: Callable[[], bool]) -> float:
        while not stopped():
            time.sleep(0.001)
        seen.append(threading.current_thread().name)
        return 0.2

    pearl = FakePearl(draft)
    runner = Runner(pearl, thread)
    assert runner._model_forward() == "hidden"
    assert seen != []
    assert seen[0] != threading.current_thread().name
    ((trees, seconds),) = pearl.plans
    assert set(trees) == {"a", "b"}
    assert seconds == pytest.approx(0.5)
    runner._settle_pearl({"a": [1]})
    assert pearl.settled == [{"a": [1]}]
    assert runner.counts == {
        "beside_steps": 2,
        "beside_passes": 5,
        "beside_requests": 3,
        "beside_hits": 1,
    }
    assert pearl.tally == Tally()


class Device(BesideThread):
    """A place on a device: what the target has launched takes a while to be computed."""

    waits = 0

    def finish(self) -> None:
        time.sleep(0.05)
        self.waits += 1


@pytest.mark.parametrize("planned", [True, False])
def test_a_target_on_a_device_has_ended_when_the_device_has(planned: bool) -> None:
    place = Device(max(os.sched_getaffinity(0)))
    seen = []

    def draft(stopped: Callable[[], bool]) -> float:
        while not stopped():
            time.sleep(0.001)
        seen.append(place.waits)
        return 0.05

    runner = Runner(FakePearl(draft, planned), place)
    recorded: list[float] = []
    runner._alone = SimpleNamespace(  # type: ignore[assignment]
        seconds=lambda rows: 0.5, record=lambda rows, seconds: recorded.append(seconds)
    )
    runner._model_forward()
    assert place.waits == 1
    assert seen == [1] * planned
    assert all(seconds >= 0.05 for seconds in recorded)
    assert len(recorded) == (not planned)


def test_a_step_alone_measures_the_target(thread: BesideThread) -> None:
    runner = Runner(FakePearl(lambda stopped: 0.0, planned=False), thread)
    recorded: list[int] = []
    runner._alone = SimpleNamespace(  # type: ignore[assignment]
        seconds=lambda rows: 0.5, record=lambda rows, seconds: recorded.append(rows)
    )
    runner._model_forward()
    assert recorded == [4]
    assert runner._drafted is None


def test_an_error_of_the_target_waits_for_the_thread(thread: BesideThread) -> None:
    ended = []

    def draft(stopped: Callable[[], bool]) -> float:
        while not stopped():
            time.sleep(0.001)
        time.sleep(0.02)
        ended.append(True)
        return 0.1

    runner = Runner(FakePearl(draft), thread)

    def broken() -> str:
        raise RuntimeError("the target broke")

    runner.target = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="the target broke"):
        runner._model_forward()
    assert ended == [True]


def test_an_error_beside_is_raised_when_the_step_is_learnt(thread: BesideThread) -> None:
    def draft(stopped: Callable[[], bool]) -> float:
        raise RuntimeError("the draft broke")

    pearl = FakePearl(draft)
    runner = Runner(pearl, thread)
    assert runner._model_forward() == "hidden"
    with pytest.raises(RuntimeError, match="the draft broke"):
        runner._settle_pearl({})
    assert pearl.settled == [{}]
    assert pearl.overlap is None  # not again
    runner._settle_pearl({})  # and it is raised once


class Rehearsing:
    """A draft model whose first pass takes longer, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.passes: list[tuple[str, bool]] = []

    def rehearse(self) -> None:
        if self.error is not None:
            raise self.error
        with own_context(VllmConfig(), {"mine": 1}, {}):
            own = forward_context.get_forward_context().attn_metadata == {"mine": 1}
            self.passes.append((threading.current_thread().name, own))

    def why_not_beside(self) -> str | None:
        return None


def started(model: Rehearsing, thread: BesideThread, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A runner whose draft model has been started."""
    monkeypatch.setattr(DraftModelMixin, "start_draft_model", lambda self, prior: None)
    runner: Any = Runner(FakePearl(lambda stopped: 0.0), thread)
    runner._draft_model, runner.vllm_config, runner._predictor = model, VllmConfig(), None
    runner._beside, runner.place_beside, runner.trees_refused = None, thread, None
    runner._options = PearlConfig(model="draft")
    runner.start_draft_model([(1, 0.01)])
    return runner


def test_first_passes_are_made_before_any_is_timed(
    thread: BesideThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = started(Rehearsing(), thread, monkeypatch)
    assert runner._beside is thread
    assert runner._pearl.overlap is not None
    assert len(runner._draft_model.passes) == 2
    assert all(name.startswith("vllm-ext-draft") for name, _ in runner._draft_model.passes)
    assert all(own for _, own in runner._draft_model.passes)


def test_where_a_first_pass_fails_nothing_is_drafted_beside(
    thread: BesideThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    with logged(logging.INFO) as lines:
        runner = started(Rehearsing(RuntimeError("out of memory")), thread, monkeypatch)
    assert runner._beside is None
    assert runner._pearl.overlap is None
    reason = f"in line (a first pass {thread.where} failed: out of memory)"
    assert any(reason in line for line in lines)
