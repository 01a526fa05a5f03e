# SPDX-License-Identifier: Apache-2.0
"""What a model runner does for a draft model: load it, and tell it what happens to requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.logger import init_logger

from proposers.cost_model import CostModel
from vllm_ext import hooks
from vllm_ext.worker.draft_model import DraftModel
from vllm_ext.worker.draft_predictor import DraftPredictor
from vllm_ext.worker.step import STEP_ATTRIBUTE, Step

logger = init_logger("vllm.vllm_ext")


class DraftModelMixin:
    """Goes before a V1 runner class in the bases of a subclass.

    Attributes:
        partial_trees: whether the runner's tree attention takes the last rows of a tree alone,
            those before them being in the cache.
    """

    partial_trees = True

    _options: Any
    _draft_model: DraftModel | None = None
    _predictor: DraftPredictor | None = None
    _seconds = 0.0

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        """Stock; then the draft model, if the options name one."""
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        if getattr(self._options, "model", None) is not None:
            hooks.require(hooks.DRAFT)
            self._draft_model = DraftModel(self, self._options, beside=self._beside_wanted())

    def _beside_wanted(self) -> bool:
        """Whether passes of the draft model may run beside the target's."""
        return False

    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> None:
        """Stock; then the draft model finds its part, and sets its layers up for its own dtype."""
        super().initialize_kv_cache(*args, **kwargs)  # type: ignore[misc]
        if self._draft_model is not None:
            self._draft_model.bind()

    def start_draft_model(self: Any, prior: Sequence[tuple[int, float]]) -> None:
        """Measure the passes of the draft model and let it predict.

        Args:
            prior: measured (rows, seconds) of the target's forward pass.
        """
        model = self._draft_model
        if model is None:
            return
        measured = model.measure([rows for rows, _ in prior])
        self._predictor = DraftPredictor(
            model,
            self,
            branching=self.trees_refused is None,
            partial=self.partial_trees,
            cost=CostModel(measured),
        )
        curve = ", ".join(f"{rows}: {1e3 * seconds:.1f}" for rows, seconds in measured)
        logger.info(
            "vllm-ext: draft model %s, %d layers, drafts of %d tokens; a pass in ms by rows: %s",
            self._options.model,
            len(model.layers),
            model.drafted_vocab,
            curve,
        )

    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Stock; requests that lost their blocks are forgotten."""
        if self._predictor is not None:
            for request in scheduler_output.scheduled_cached_reqs.resumed_req_ids:
                self._predictor.forget(request)
            self._predictor.ledger.forget(scheduler_output.new_block_ids_to_zero or ())
        return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]

    def attach_trees(
        self, metadata: Any, step: Step, query_starts: Any, bases: Any, block_table: torch.Tensor
    ) -> None:
        """Attach the trees of a pass of the draft model to its attention metadata.

        Args:
            metadata: as vLLM's builder made it.
            step: of the pass, with branching trees.
            query_starts: int32 [requests + 1]; first row of each request.
            bases: int32 [requests]; slot of each tree's root.
            block_table: [requests, pages].
        """
        setattr(metadata, STEP_ATTRIBUTE, step.attention)

    def draft_model_seconds(self) -> float:
        """Seconds spent in and around passes of the draft model since the last call."""
        if self._draft_model is None:
            return 0.0
        around = self._predictor.around if self._predictor is not None else 0.0
        seconds = self._draft_model.seconds + around
        since, self._seconds = seconds - self._seconds, seconds
        return max(0.0, since)

    def drop_failed_draft_model(self) -> None:
        """Go on without a draft model whose pass has raised an error."""
        if self._draft_model is not None and self._draft_model.failed:
            logger.error("vllm-ext: the draft model failed and is not used any more")
            self._predictor = None

    def _on_request_state_removed(self: Any, req_id: str, req_state: Any) -> None:
        super()._on_request_state_removed(req_id, req_state)  # type: ignore[misc]
        if self._predictor is not None:
            self._predictor.forget(req_id)
