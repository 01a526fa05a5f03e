# SPDX-License-Identifier: Apache-2.0
"""Token trees in vLLM's model runner (V1): a mixin whose methods wrap the stock ones.

One step::

    scheduler output -> _prepare_inputs            positions = base + depth
                     -> _build_attention_metadata  trees attached for the attention layers
                     -> forward (stock)            keys and values of tree rows stashed; PEARL
                                                   drafts beside it
                     -> _sample                    the walk, then KV commit
                     -> _bookkeeping_sync (stock)
                     -> propose_draft_token_ids    learn from the step, draft the next
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.v1.outputs import SamplerOutput

from proposers.cost_model import AttentionCost
from proposers.tree import TokenTree
from vllm_ext import hooks
from vllm_ext.build import build_drafter, load_resources
from vllm_ext.config import read_options
from vllm_ext.enclosed import enclose
from vllm_ext.worker.calibration import CalibrationMixin
from vllm_ext.worker.commit import commit
from vllm_ext.worker.counting import CountingMixin
from vllm_ext.worker.drafting import Candidates, Drafting, batch_limit, candidates, node_limit
from vllm_ext.worker.latency import StepTimer
from vllm_ext.worker.metrics import Counters
from vllm_ext.worker.processing import ProcessorsMixin, processors_built_under_speculation
from vllm_ext.worker.ratio_walk import ratio_walk
from vllm_ext.worker.rowwise import why_sequential
from vllm_ext.worker.sampled_runner import SampledDraftsMixin
from vllm_ext.worker.step import STEP_ATTRIBUTE, AttentionStep, Step, build_step
from vllm_ext.worker.walk import WalkResult, stack_logprobs, walk

logger = init_logger("vllm.vllm_ext")

_MOST_FAILURES = 8.0
_FORGIVEN = 0.01
"""Failures of drafting after which it stays off, and what each step that succeeds takes back."""


class TreeRunnerMixin(CalibrationMixin, ProcessorsMixin, CountingMixin, SampledDraftsMixin):
    """Goes before a V1 runner class in the bases of a subclass.

    Attributes:
        trees_refused: why branching trees cannot be verified here (then chains are drafted), or
            ``None``.
        touched: the hooks that this runner and its worker rely on.
        walk_is_timed: whether the walk's time is its own; a device's waits for the forward pass.
        learns_later: whether rows are learnt from while a device computes the next step.
    """

    touched: tuple[hooks.Hook, ...] = hooks.WORKER
    walk_is_timed = True
    learns_later = False
    trees_refused: str | None = "tree attention was not set up"
    _late: Exception | None = None  # raised by learning beside the device

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        self._method, self._options = read_options(vllm_config)
        with processors_built_under_speculation():
            super().__init__(vllm_config, device)  # type: ignore[call-arg]
        scheduler = vllm_config.scheduler_config
        self._token_budget = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
        self._counters = Counters(shared=get_tp_group().rank_in_group == 0)
        self._timer = StepTimer()
        self._drafting: Drafting | None = None
        self._failures = 0.0
        self._step: Step | None = None
        self._walked: WalkResult | None = None
        self._seen: Candidates | None = None

    # -- start-up ---------------------------------------------------------------------------------

    def start_drafting(self: Any, prior: list[tuple[int, float]], attention: AttentionCost) -> None:
        """Begin to draft, once it is known what can be verified and what a step costs.

        Args:
            prior: measured (rows, seconds) of the forward pass, without attention.
            attention: measured beside it.
        """
        self._timer.start(prior, attention, adaptive=self._options.adaptive)
        self.start_draft_model(prior)
        self._resources = load_resources(
            self._options, self.model_config, self.vllm_config.load_config.download_dir
        )
        self._drafting = self._new_drafting()

    def _new_drafting(self: Any) -> Drafting:
        self._switches = 0
        drafter = build_drafter(
            self._method, self._options, self._resources, self._timer.cost, self._level_predictor()
        )
        self._sampled = self._new_sampled()
        return Drafting(drafter, trees=self.trees_refused is None, later=self.learns_later)

    def announce(self: Any, attention: str, prior: list[tuple[int, float]]) -> None:
        """Log what is in place, in one line."""
        curve = ", ".join(f"{rows}: {1e3 * seconds:.1f}" for rows, seconds in prior)
        logger.info(
            "vllm-ext: method %s, %s with at most %d nodes, attention: %s; wrapped %s; "
            "forward pass in ms by rows: %s",
            self._method,
            "trees" if self.trees_refused is None else f"chains ({self.trees_refused})",
            self.num_spec_tokens,
            attention,
            ", ".join(hook.name for hook in self.touched),
            curve,
        )

    # -- one step ---------------------------------------------------------------------------------

    def execute_model(self: Any, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        """Stock, timed."""
        self._timer.begin(scheduler_output.total_num_scheduled_tokens)
        return super().execute_model(scheduler_output, intermediate_tensors)

    def _prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)  # type: ignore[misc]
        batch = self.input_batch
        count = batch.num_reqs
        self._step = step = build_step(
            batch.req_ids[:count],
            scheduler_output.scheduled_spec_decode_tokens,
            self._drafting.trees if self._drafting is not None else {},
            self.query_start_loc.np[: count + 1],
            batch.num_computed_tokens_cpu[:count],
        )
        contexts = batch.num_computed_tokens_cpu[:count].tolist()
        branching = len(step.attention.trees) if step.attention is not None else 0
        self._timer.attend(contexts, [len(tree) for tree in step.trees], branching)
        if step.attention is not None:
            # In one go: to a GPU every copy is a call of its own.
            trees = step.attention.trees
            positions = torch.from_numpy(np.concatenate([t.base + t.depths for t in trees]))
            rows = step.attention.rows = step.attention.rows.to(self.device, non_blocking=True)
            self.positions[rows] = positions.to(self.device, non_blocking=True)
        return prepared

    def _build_attention_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        built = super()._build_attention_metadata(*args, **kwargs)  # type: ignore[misc]
        if self._step is not None and self._step.attention is not None:
            for metadata in built[0].values():
                setattr(metadata, STEP_ATTRIBUTE, self._step.attention)
        return built

    def _sample(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        if logits is None or self._step is None:
            return super()._sample(logits, spec_decode_metadata)  # type: ignore[misc]
        step: Step = self._step
        if step.plain and self._sampled is None and not self._undrawn():
            return self._sample_plain(logits, step)
        self._seen, self._walked = self._verify(logits, step)
        walked: WalkResult = self._walked
        if step.attention is not None:
            self._commit(step.attention, walked.paths)
        return SamplerOutput(
            # On the host, where the bookkeeping reads them: on a GPU they would come back at once.
            sampled_token_ids=walked.padded(torch.device("cpu")),
            logprobs_tensors=stack_logprobs(walked.logprobs),
        )

    def _commit(self: Any, step: AttentionStep, paths: Sequence[Sequence[int]]) -> None:
        """Keys and values of accepted nodes go where they belong."""
        layers = self.compilation_config.static_forward_context
        commit(step, paths, layers, self._slot_mappings_by_layer())

    def _sample_plain(self: Any, logits: torch.Tensor, step: Step) -> Any:
        """Nothing is drafted: vLLM's own sampling, so that such a step costs what it costs there.

        Between two forward passes the processor's caches hold the weights and nothing else: code
        that runs once a step takes several times what it takes in a loop.
        """
        self._catch_up()
        begin = time.perf_counter()
        self._seen = candidates(logits) if self._listens(step) else None
        looked = time.perf_counter()
        output = super()._sample(logits, None)  # type: ignore[misc]
        if self.walk_is_timed:
            end = time.perf_counter()
            self._timer.work_outside(end - begin, sampling=end - looked)
        return output

    def _verify(
        self: Any, logits: torch.Tensor, step: Step
    ) -> tuple[Candidates | None, WalkResult]:
        """Candidates at the step's rows, and the walk over its trees."""
        self._verifications = verifications = self._verify_how(step)
        if all(verification is None for verification in verifications):
            return self._match(logits, step)  # type: ignore[no-any-return]
        ruled = partial(ratio_walk, verifications=verifications)
        return self._walk(ruled, logits, step)  # type: ignore[no-any-return]

    def _match(self: Any, logits: torch.Tensor, step: Step) -> tuple[Candidates | None, WalkResult]:
        """As `_verify`, where no tree was drawn."""
        metadata = self.input_batch.sampling_metadata
        rowwise = any(step.trees) and why_sequential(self.sampler, metadata) is None
        return self._walk(partial(walk, rowwise=rowwise), logits, step)  # type: ignore[no-any-return]

    def _listens(self: Any, step: Step) -> bool:
        return self._drafting is not None and bool(self._drafting.listens(step))

    def _walk(
        self: Any, how: Callable[..., WalkResult], logits: torch.Tensor, step: Step
    ) -> tuple[Candidates | None, WalkResult]:
        batch = self.input_batch
        self._catch_up()
        begin = time.perf_counter()
        # Before the walk: a processor may write into the logits.
        seen = candidates(logits) if self._listens(step) else None
        looked = time.perf_counter()
        with self._processors_walking():
            walked = how(
                self.sampler,
                logits,
                batch.sampling_metadata,
                step.trees,
                step.starts,
                batch.req_output_token_ids,
                self._update_processors,
                undrawn=self._undrawn(),
            )
        if self.walk_is_timed:
            end = time.perf_counter()
            self._timer.work_outside(end - begin, sampling=end - looked)
        return seen, walked

    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        """Stock; the drafts that it made go out with its output."""
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        drafts = self.take_draft_token_ids()
        if drafts is not None and not any(drafts.draft_token_ids):
            drafts = None  # it would tell the scheduler nothing, and has to be sent
        return enclose(output, drafts)

    def propose_draft_token_ids(
        self: Any,
        scheduler_output: Any,
        sampled_token_ids: Any,
        sampling_metadata: Any,
        hidden_states: Any,
        sample_hidden_states: Any,
        *args: Any,
        **kwargs: Any,
    ) -> list[list[int]]:
        """Learn from the step and draft the next; replaces the stock dispatch to a proposer.

        Returns:
            Per request of the batch its tree's tokens, best first; empty for unfinished prompts.
        """
        begin = time.perf_counter()
        request_ids = self.input_batch.req_ids[: self.input_batch.num_reqs]
        trees: dict[str, TokenTree] = {}
        if self._drafting is not None:
            group = get_tp_group()
            prompts = self._observe_prompts(scheduler_output, request_ids, hidden_states)
            if group.rank_in_group == 0:
                trees = self._try_to_draft(
                    scheduler_output, request_ids, sampled_token_ids, prompts, sample_hidden_states
                )
            if group.world_size > 1:
                # Latencies differ between ranks, hence so would trees: rank 0 decides for all.
                trees = group.broadcast_object(trees, src=0)
            self._drafting.trees = trees
            self._count(sampled_token_ids, time.perf_counter() - begin)
        self._step = self._walked = self._seen = None
        self._timer.work_outside(time.perf_counter() - begin)
        self._timer.end()
        return [list(trees[r].tokens) if r in trees else [] for r in request_ids]

    def _try_to_draft(self: Any, *step: Any) -> dict[str, TokenTree]:
        """Draft, or go on without a draft: nothing in drafting may take the engine down."""
        if self._failures >= _MOST_FAILURES:
            return {}
        try:
            trees = dict(self._draft(*step))
            self._failures = max(0.0, self._failures - _FORGIVEN)
            return trees
        except Exception:
            self._drop_drafting()
            return {}
        finally:
            self._timer.exclude(self.draft_model_seconds())

    def _drop_drafting(self: Any) -> None:
        """After an exception: begin drafting anew, and stay off if that happens again and again."""
        logger.exception("vllm-ext: drafting failed; its state is dropped, serving goes on")
        self._counters.add("drafting_errors", 1)
        self._failures += 1.0
        if self._failures >= _MOST_FAILURES:
            logger.error("vllm-ext: drafting fails again and again and stays off; see above")
        self.drop_failed_draft_model()
        self._drafting = self._new_drafting()

    def _catch_up(self: Any) -> None:
        """Learn from the rows of the step before, just before the host waits for the device."""
        try:
            if self.learns_later and self._drafting is not None:
                self._drafting.catch_up()
        except Exception as error:
            self._late = error  # raised when this step is drafted for, whose verification goes on

    def _draft(
        self: Any,
        scheduler_output: Any,
        request_ids: list[str],
        tokens: Any,
        prompts: list[tuple[str, range, Candidates]],
        hidden: torch.Tensor,
    ) -> dict[str, TokenTree]:
        drafting: Drafting = self._drafting
        if self._late is not None:
            late, self._late = self._late, None
            raise late
        if self._walked is None:  # a plain step
            self._walked = WalkResult.plain(tokens)
        self._settle_pearl(dict(zip(request_ids, tokens, strict=True)))
        for request_id, positions, seen in prompts:
            drafting.learn_prompt(self.requests[request_id], positions, seen)
        drafting.learn(self._step, self._walked, self._seen, request_ids, self.requests, tokens)
        self._learn_draws(request_ids, self._walked)
        ready = [r for r, emitted in zip(request_ids, tokens, strict=True) if emitted]
        unread = [r for r, emitted in zip(request_ids, tokens, strict=True) if not emitted]
        scheduled = scheduler_output.num_scheduled_tokens
        unfinished = sum(min(self.requests[r].num_tokens, scheduled[r]) for r in unread)
        named = self._sampled is None  # drawn drafts have a gate of their own
        if named and drafting.rests(ready, unfinished):
            self._count_decisions(drafting, ready)
            return drafting.trees
        limits = {
            r: node_limit(self.requests[r], self.max_model_len, self.num_spec_tokens) for r in ready
        }
        drafting.see(self._step, self._walked, request_ids, limits, hidden)
        if self._predictor is not None:
            self._predictor.prompts = {
                r: self.requests[r].num_computed_tokens + scheduled[r] for r in unread
            }
        most = batch_limit(self._token_budget, len(ready))
        drawn = self._draw_trees(ready, limits, unfinished, most)
        limits.update(dict.fromkeys(drawn, 0))
        nodes = sum(map(len, drawn.values()))
        left = max(0, most - nodes)
        drafting.propose(ready, limits, other_rows=unfinished + nodes, most=left, asked=named)
        self._prune_forbidden(drafting.trees, request_ids)
        drafting.trees.update(drawn)
        self._count_decisions(drafting, ready)
        return drafting.trees

    def _observe_prompts(
        self: Any, scheduler_output: Any, request_ids: list[str], hidden_states: Any
    ) -> list[tuple[str, range, Candidates]]:
        """Candidates at the last positions of prompts that end in this step.

        Runs on every rank: with tensor parallelism the output layer is a collective operation.
        """
        most = self._options.prompt_rows
        if not most or self.lora_config is not None:  # adapters are mapped to sampled rows only
            return []
        found = []
        for index, request_id in enumerate(request_ids):
            state = self.requests[request_id]
            computed = state.num_computed_tokens
            last = state.num_prompt_tokens - 1  # its row is learnt with the step itself
            first = max(computed, last - most)
            ends_here = computed + scheduler_output.num_scheduled_tokens[request_id] > last
            if state.prompt_token_ids is None or not ends_here or first >= last:
                continue
            row = int(self.query_start_loc.np[index]) + first - computed
            logits = self.model.compute_logits(hidden_states[row : row + last - first])
            found.append((request_id, range(first, last), candidates(logits)))
        return found

    def _input_fits_in_drafter(self: Any, common_attn_metadata: Any) -> bool:
        return True  # the drafter bounds its trees; False would publish zeros as drafts

    def _on_request_state_removed(self: Any, req_id: str, req_state: Any) -> None:
        super()._on_request_state_removed(req_id, req_state)
        if self._drafting is not None:
            try:
                self._drafting.stop(req_id)  # which learns what the request said last
            except Exception:
                self._drop_drafting()

    # -- helpers ----------------------------------------------------------------------------------

    def _undrawn(self: Any) -> list[int]:
        """Requests whose generator must not advance; the stock runner rolls GPU generators back."""
        return []

    def _slot_mappings_by_layer(self: Any) -> dict[str, torch.Tensor]:
        """Slots of the batch's rows, by layer name."""
        mappings = {}
        for gid, group in enumerate(self.kv_cache_config.kv_cache_groups):
            slots = self.input_batch.block_table[gid].slot_mapping.gpu
            mappings.update(dict.fromkeys(group.layer_names, slots))
        return mappings
