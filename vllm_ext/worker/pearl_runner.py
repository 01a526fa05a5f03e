# SPDX-License-Identifier: Apache-2.0
"""PEARL in the model runner: the draft model's passes beside the target's forward pass."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol, TypeVar

from vllm.forward_context import set_forward_context
from vllm.logger import init_logger

from proposers.cost_model import CostModel
from proposers.levels import LevelPredictor
from proposers.overlap import Overlap
from proposers.pearl import Pearl, Tally
from proposers.tree import TokenTree
from vllm_ext import hooks
from vllm_ext.method_options import PearlConfig
from vllm_ext.worker.beside import per_thread_context
from vllm_ext.worker.draft_runner import DraftModelMixin
from vllm_ext.worker.trace import Trace

logger = init_logger("vllm.vllm_ext")

T = TypeVar("T")

_REHEARSALS = 2


class Beside(Protocol):
    """Where a pass can run beside the target's: `BesideThread` or `BesideStream`."""

    @property
    def where(self) -> str:
        """For the log."""

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Run `job` there."""

    def finish(self) -> None:
        """Wait until what the calling thread has started has been computed."""


class PearlMixin(DraftModelMixin):
    """Goes before a V1 runner class in the bases of a subclass.

    Attributes:
        place_beside: where passes beside the target's may run, or ``None``.
        why_no_place: the reason then.
    """

    place_beside: Beside | None = None
    why_no_place = "this engine has no place beside the target"

    _pearl: Pearl | None = None
    _beside: Beside | None = None
    _drafted: Future[float] | None = None

    def _beside_wanted(self: Any) -> bool:
        return isinstance(self._options, PearlConfig) and self.place_beside is not None

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        """As the base class, once it is clear that models can run side by side."""
        if self._beside_wanted():
            hooks.require(hooks.PEARL)
        super().load_model(*args, **kwargs)

    def start_draft_model(self: Any, prior: Sequence[tuple[int, float]]) -> None:
        """As the base class; then decide where PEARL drafts."""
        super().start_draft_model(prior)
        if not isinstance(self._options, PearlConfig):
            return
        place: Beside | None = self.place_beside
        reason = self.why_no_place if place is None else self.trees_refused
        reason = reason or self._draft_model.why_not_beside()
        if reason is None and place is not None:
            reason = self._why_not_rehearsed(place)
        self._pearl = Pearl(
            self._predictor,
            most=self._options.max_depth,
            overlap=Overlap() if reason is None else None,
        )
        if reason is None and place is not None:
            self._beside = place
            self._alone = CostModel(prior)
            self._trace = self._draft_model.trace = Trace.from_environment()
            where = f"beside the target, {place.where}"
        else:
            where = f"in line ({reason})"
        logger.info("vllm-ext: PEARL drafts %s", where)

    def _why_not_rehearsed(self: Any, place: Beside) -> str | None:
        """Make first passes at the place; why that failed, or ``None``."""
        try:
            with set_forward_context(None, self.vllm_config), per_thread_context():
                for _ in range(_REHEARSALS):
                    place.submit(self._draft_model.rehearse).result()
        except Exception as error:
            logger.exception("vllm-ext: a first pass beside the target failed")
            return f"a first pass {place.where} failed: {error}"
        return None

    def _level_predictor(self: Any) -> LevelPredictor | None:
        """What the method's grower asks."""
        return self._pearl if self._pearl is not None else self._predictor  # type: ignore[no-any-return]

    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """As the base class; requests that lost their blocks are forgotten."""
        if self._pearl is not None:
            for request in scheduler_output.scheduled_cached_reqs.resumed_req_ids:
                self._pearl.forget(request)
        return super().execute_model(scheduler_output, *args, **kwargs)

    def _model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._beside is None or self._pearl is None or self._step is None:
            return super()._model_forward(*args, **kwargs)  # type: ignore[misc]
        pearl: Pearl = self._pearl
        rows = int(self.query_start_loc.np[self.input_batch.num_reqs])
        trees: Mapping[str, TokenTree] = dict(
            zip(self.input_batch.req_ids, self._step.trees, strict=False)
        )
        alone = self._alone.seconds(rows)
        planned = pearl.plan(trees, alone)
        begin = time.perf_counter()
        if not planned:
            output = super()._model_forward(*args, **kwargs)  # type: ignore[misc]
            self._beside.finish()
            end = time.perf_counter()
            self._alone.record(rows, end - begin)
            self._trace.span("target", begin, end, rows=rows)
            return output
        ended = threading.Event()
        with per_thread_context():
            future = self._beside.submit(partial(pearl.draft, ended.is_set))
            try:
                output = super()._model_forward(*args, **kwargs)  # type: ignore[misc]
                self._beside.finish()  # drafting goes on while a device still works for the target
                self._trace.span("target", begin, time.perf_counter(), rows=rows)
            finally:
                ended.set()
                wait([future])
        self._drafted = future
        if future.exception() is None and pearl.overlap is not None:
            pearl.overlap.record(time.perf_counter() - begin, alone, future.result())
        return output

    def _settle_pearl(self: Any, emitted: Mapping[str, Sequence[int]]) -> None:
        """The step has ended; raises what drafting beside it has raised."""
        if self._pearl is None:
            return
        drafted, self._drafted = self._drafted, None
        self._pearl.settle(emitted)
        if drafted is not None:
            if drafted.exception() is not None:
                self._pearl.overlap = None  # in line from here on, if the model can still be used
            drafted.result()
        tally, self._pearl.tally = self._pearl.tally, Tally()
        for name, count in asdict(tally).items():
            self._counters.add(f"beside_{name}", count)

    def drop_failed_draft_model(self: Any) -> None:
        """As the base class."""
        super().drop_failed_draft_model()
        if self._predictor is None:
            self._pearl = None

    def _on_request_state_removed(self: Any, req_id: str, req_state: Any) -> None:
        super()._on_request_state_removed(req_id, req_state)
        if self._pearl is not None:
            self._pearl.forget(req_id)
