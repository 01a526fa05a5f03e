# SPDX-License-Identifier: Apache-2.0
"""What a model runner does for drawn drafts: which requests get them, how each is verified.

Greedy requests keep named trees: for them every rule emits the same tokens, and the likeliest
tokens are accepted most. So do requests whose tokens our own processors choose: their law has one
token, which a named tree holds most often. All others have drawn trees while those pay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)

from logits_processors.vllm_v1 import V1Processor
from proposers.tree import TokenTree
from proposers.verify_tree import Verification
from vllm_ext.worker.pearl_runner import PearlMixin
from vllm_ext.worker.sampled_drafting import Applicant, SampledDrafting
from vllm_ext.worker.step import Step
from vllm_ext.worker.walk import WalkResult

_GREEDY_BELOW = 1e-5  # vLLM's own limit on the temperature
_MATCH = "match"


class SampledDraftsMixin(PearlMixin):
    """Goes before a V1 runner class in the bases of a subclass."""

    _sampled: SampledDrafting | None = None
    _verifications: Sequence[Verification | None] = ()

    def _new_sampled(self: Any) -> SampledDrafting | None:
        """``None`` where drafts are named: by the option, or because there is no draft model."""
        rule: Any = getattr(self._options, "verify", _MATCH)
        if rule == _MATCH or self._predictor is None:
            return None
        return SampledDrafting(
            rule,
            self._predictor,
            draw=self._options.draw,
            seed=self.model_config.seed,
            max_depth=self._options.max_depth,
            max_batch_nodes=self._options.max_batch_nodes,
            adaptive=self._options.adaptive,
        )

    def _draw_trees(
        self: Any, ready: Sequence[str], limits: Mapping[str, int], other_rows: int, most: int
    ) -> dict[str, TokenTree]:
        """Drawn trees of those requests that get one.

        Args:
            ready: requests that emitted a token in this step.
            limits: most nodes per request.
            other_rows: rows of unfinished prompts expected in the next step.
            most: nodes over all requests.
        """
        sampled: SampledDrafting | None = self._sampled
        if sampled is None:
            return {}
        applicants = []
        base_rows = len(ready) + other_rows
        contexts = [self.requests[request].num_tokens for request in ready]
        for request in ready:
            state = self.requests[request]
            params = state.sampling_params
            row = self.input_batch.req_id_to_index[request]
            if params.temperature < _GREEDY_BELOW or not limits[request] or self._chosen(row):
                continue
            chain = self.trees_refused is not None or params.structured_outputs is not None
            position = len(state.output_token_ids)
            applicants.append(Applicant(request, params, position, limits[request], chain))
        return sampled.propose(
            applicants,
            self._timer.cost.in_context(base_rows, contexts),
            base_rows=base_rows,
            base_tokens=float(len(ready)),
            most=most,
        )

    def _verify_how(self: Any, step: Step) -> list[Verification | None]:
        """Per request of the batch, its rule at work, ``None`` for the match walk; or nothing where
        no trees are drawn at all.
        """
        sampled: SampledDrafting | None = self._sampled
        if sampled is None:
            return []
        batch = self.input_batch
        found: list[Verification | None] = []
        for row, request in enumerate(batch.req_ids[: batch.num_reqs]):
            if self.discard_request_mask.np[row]:  # an unfinished prompt: nothing is emitted
                found.append(None)
                continue
            state = self.requests[request]
            found.append(
                sampled.verification(
                    request,
                    state.sampling_params,
                    len(state.output_token_ids),
                    step.trees[row],
                    as_it_goes=self._as_it_goes(request, row),
                )
            )
        return found

    def _learn_draws(self: Any, request_ids: Sequence[str], walked: WalkResult) -> None:
        """Tell how the drawn trees of a step fared."""
        for row, verification in enumerate(self._verifications):
            if verification is not None:
                self._sampled.learn(request_ids[row], walked.tokens[row], walked.paths[row])

    def _chosen(self: Any, row: int) -> bool:
        """Whether one of our processors chooses the tokens of a row."""
        processors = self.input_batch.logitsprocs.all
        return any(isinstance(p, V1Processor) and p.owns(row) for p in processors)

    def _as_it_goes(self: Any, request: str, row: int) -> bool:
        """Whether tokens must be known one by one, which block verification cannot do: for their
        logprobs, or because a processor keeps what it has seen of the text.
        """
        batch = self.input_batch
        if request in batch.num_logprobs or row in (
            batch.sampling_metadata.logprob_token_ids or {}
        ):
            return True
        return any(_keeps_text(processor, row) for processor in batch.logitsprocs.all)

    def _on_request_state_removed(self: Any, req_id: str, req_state: Any) -> None:
        super()._on_request_state_removed(req_id, req_state)
        if self._sampled is not None:
            self._sampled.stop(req_id)


def _keeps_text(processor: Any, row: int) -> bool:
    """Whether a processor may remember a text that it was shown and that was then taken back."""
    if isinstance(processor, (LogitBiasLogitsProcessor, MinPLogitsProcessor)):
        return False
    if isinstance(processor, MinTokensLogitsProcessor):
        return row in processor.min_toks  # forgotten for good once the text is long enough
    if isinstance(processor, V1Processor):
        return processor.owns(row)
    return True
