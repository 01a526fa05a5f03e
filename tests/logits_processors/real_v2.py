# SPDX-License-Identifier: Apache-2.0
"""vLLM's own Model Runner V2 around the toy model.

Real: the runner's methods that take requests in and out, lay the batch out, sample and write the
tokens back, with all their kernels; its request states, input buffers, sampler and rejection
sampler; the loader that finds our processor by its entry point. Replaced: what needs a model or a
KV cache (:class:`Absent`), the scheduler (:meth:`RealV2._schedule` asks for what it would), and the
draft model (the caller guesses). What a DEVICE lacks is in ``v2_kernels.py``, which also says where
this module can be imported.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from toy_engine import MODEL, _until_end, config
from toy_model import TINY
from v2_kernels import (
    DEVICE,
    BatchExecutionDescriptor,
    GPUModelRunner,
    InputBatch,
    InputBuffers,
    RequestState,
    Sampler,
    rejection_sampler,
)
from vllm import SamplingParams
from vllm.config import CUDAGraphMode
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors

from logits_processors.session import Record

SLOTS = 4
LENGTH = 64
DRAFTS = 4


class Absent:
    """Stands for a part of the runner that has no say in sampling: every call does nothing."""

    num_new_sampled_tokens_per_step = 1

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: None


class ToyModule:
    """The toy model, which sees nothing but the tokens and positions that a batch feeds it."""

    def __init__(self, states: Any) -> None:
        self._states = states
        self._fed = np.zeros((SLOTS, LENGTH), dtype=np.int64)  # in place of a KV cache

    def __call__(self, batch: Any) -> torch.Tensor:
        """Return "hidden states", which are already the logits, of every token in the batch."""
        fed, positions = batch.input_ids.tolist(), batch.positions.tolist()
        rows = []
        for at, slot in enumerate(batch.idx_mapping_np):
            start = int(self._states.prompt_len.np[slot])
            for row in range(*batch.query_start_loc_np[at : at + 2]):
                self._fed[slot, positions[row]] = fed[row]
                rows.append(MODEL.logits(self._fed[slot, start : positions[row] + 1].tolist()))
        rows += [np.zeros(TINY.size)] * (batch.num_tokens_after_padding - len(rows))
        return torch.from_numpy(np.array(rows)).float().to(DEVICE)

    @staticmethod
    def compute_logits(hidden: torch.Tensor) -> torch.Tensor:
        return hidden.clone()


@dataclass
class Known:
    """What the scheduler knows of a request."""

    prompt: list[int]
    params: SamplingParams
    text: list[int] = field(default_factory=list)
    computed: int = 0
    in_batch: bool = False


class RealV2(GPUModelRunner):  # type: ignore[misc]
    """Model Runner V2 and the part of a scheduler.

    Args:
        method: of the rejection sampler.
        padding: tokens and requests that a CUDA graph would add to the batch.
        draft_logits: ``[slots, drafts, V]`` laws that drafts are drawn from; ``None`` if a draft is
            a guess.
        options: fields of the configuration that differ.

    Attributes:
        texts: what was emitted, by request.
        given: logits of the last step, ``[rows, V]``.
        shown: what the last step drew from instead.
        logprobs: vLLM's of each emitted token, where requests ask for them, by request.
    """

    def __init__(
        self,
        method: str = "standard",
        padding: int = 0,
        draft_logits: torch.Tensor | None = None,
        **options: Any,
    ) -> None:
        self.vllm_config = config(**options)
        self.vllm_config.reasoning_config = None
        self.model_config = self.vllm_config.model_config
        self.model_config.rswa_window = None
        self.device = DEVICE
        self.max_num_reqs = SLOTS
        self.use_pp, self.is_last_pp_rank = False, True
        self.num_speculative_steps, self.decode_query_len = DRAFTS, DRAFTS + 1
        self.pooling_runner = self.pp_handler = self.encoder_cache = self.batch_sharder = None
        self.adaptive_verification = self.pcp_manager = self.fast_prefill = None
        self.model_state = self.lora_state = self.block_tables = Absent()
        self.prompt_logprobs_worker = Absent()
        self.req_states = RequestState(SLOTS, LENGTH, LENGTH, DRAFTS, TINY.size, DEVICE)
        self.input_buffers = InputBuffers(SLOTS, LENGTH, DEVICE)
        self.processors = build_custom_logits_processors(
            self.vllm_config, self.req_states, False, ()
        )
        self.sampler = Sampler(
            self.vllm_config,
            SLOTS,
            TINY.size,
            DEVICE,
            self.req_states,
            logprobs_mode=self.model_config.logprobs_mode,
            num_speculative_tokens=self.decode_query_len,
            custom_logits_processors=self.processors,
        )
        speculation = SimpleNamespace(
            num_speculative_tokens=DRAFTS,
            enable_adaptive_verification=False,
            rejection_sample_method=method,
        )
        self.rejection_sampler = rejection_sampler.RejectionSampler(
            self.sampler, speculation, DEVICE
        )
        self.speculator = SimpleNamespace(draft_logits=draft_logits)
        self.model = ToyModule(self.req_states)
        self.padding = padding
        self.known: dict[str, Known] = {}
        self.texts: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[float]] = {}
        self._finished: set[str] = set()

    def add(self, name: str, params: SamplingParams, prompt: Sequence[int] = (0, 1)) -> None:
        self.known[name] = Known(list(prompt), params)
        self.texts[name] = self.known[name].text
        self.logprobs[name] = []

    def finish(self, name: str) -> None:
        """End a request; the runner hears of it in the next step."""
        del self.known[name]
        self._finished.add(name)

    def slot(self, name: str) -> int:
        return int(self.req_states.req_id_to_index[name])

    def step(
        self,
        drafts: Mapping[str, Sequence[int]] | None = None,
        scheduled: Collection[str] | None = None,
        preempted: Collection[str] = (),
        most: int = LENGTH,
    ) -> dict[str, list[int]]:
        """One step as ``execute_model`` and ``sample_tokens`` run it; returns what was emitted.

        Args:
            drafts: tokens guessed for requests whose prompt is computed.
            scheduled: the requests in the batch; all if not given.
            preempted: requests that lose their slot before the step.
            most: tokens of a prompt in one step.
        """
        output = self._schedule(drafts or {}, scheduled, preempted, most)
        self.finish_requests(output)
        self.add_requests(output)
        self.update_requests(output)
        if not output.num_scheduled_tokens:
            return {}
        for name, guess in (drafts or {}).items():
            row = self.req_states.draft_tokens[self.slot(name)]
            row[: len(guess)] = torch.tensor(guess, device=DEVICE)  # as a speculator would
        state, _ = self.gather_batch_req_state(output, dummy_run=False)
        shape = BatchExecutionDescriptor(
            CUDAGraphMode.NONE,
            output.total_num_scheduled_tokens + self.padding,
            min(len(output.num_scheduled_tokens) + self.padding, SLOTS) if self.padding else None,
        )
        batch = self.prepare_inputs(output, state, shape, 0)
        drawn, num_sampled, num_rejected = self.sample(self.model(batch), batch, None)
        self.postprocess_sampled(
            batch.idx_mapping,
            drawn.sampled_token_ids,
            num_sampled,
            num_rejected,
            batch.query_start_loc,
        )
        return self._read(batch, drawn, num_sampled.tolist(), num_rejected.tolist())

    def run(self, *names: str, drafts: Any = None) -> None:
        """Step until the named requests have ended; ``drafts(name)`` guesses what follows."""
        while running := [name for name in names if name in self.known]:
            ready = [n for n in running if drafts and self.texts[n] and self.known[n].in_batch]
            self.step({name: guess for name in ready if (guess := list(drafts(name))[:DRAFTS])})
        self.step()  # the engine tells of a finish in the step that follows it

    def records(self, *names: str) -> list[Record]:
        return [Record(**fields) for p in self.processors for fields in p.records(names)]

    def sample(self, *arguments: Any) -> Any:
        inner = self.sampler.apply_sampling_params
        before: list[torch.Tensor] = []
        after: list[torch.Tensor] = []

        def watched(logits: torch.Tensor, *inputs: Any, **options: Any) -> torch.Tensor:
            before.append(logits.clone())
            after.append(inner(logits, *inputs, **options))
            return after[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.sampler, "apply_sampling_params", watched)
            drawn = super().sample(*arguments)
        self.given, self.shown = torch.cat(before), torch.cat(after)
        return drawn

    def _schedule(
        self,
        drafts: Mapping[str, Sequence[int]],
        scheduled: Collection[str] | None,
        preempted: Collection[str],
        most: int,
    ) -> SchedulerOutput:
        output = SchedulerOutput.make_empty()
        output.finished_req_ids, self._finished = self._finished, set()
        output.preempted_req_ids = set(preempted)
        for name in preempted:
            self.known[name].in_batch, self.known[name].computed = False, 0
        cached = CachedRequestData.make_empty()
        for name in self.known if scheduled is None else scheduled:
            request = self.known[name]
            tokens = request.prompt + request.text
            if not request.in_batch:
                new = NewRequestData(name, request.prompt, [], request.params, None, ([],), 0, None)
                new.prefill_token_ids = tokens
                output.scheduled_new_reqs.append(new)
                request.in_batch = True
            else:
                cached.req_ids.append(name)
                cached.num_computed_tokens.append(request.computed)
                cached.new_block_ids.append(None)
            guess = drafts.get(name, ())
            count = min(len(tokens) - request.computed, most) + len(guess)
            output.num_scheduled_tokens[name] = count
            if guess:  # the tokens themselves stay on the device
                output.scheduled_spec_decode_tokens[name] = [-1] * len(guess)
            request.computed += count
        output.scheduled_cached_reqs = cached
        output.total_num_scheduled_tokens = sum(output.num_scheduled_tokens.values())
        return output

    def _read(
        self, batch: InputBatch, drawn: Any, sampled: Sequence[int], rejected: Sequence[int]
    ) -> dict[str, list[int]]:
        emitted = {}
        for at, name in enumerate(batch.req_ids):
            request = self.known[name]
            request.computed -= rejected[at]
            assert request.params.max_tokens is not None
            room = request.params.max_tokens - len(request.text)
            new = _until_end(drawn.sampled_token_ids[at, : sampled[at]].tolist())[:room]
            emitted[name] = new
            request.text += new
            if drawn.logprobs_tensors is not None:
                first = int(batch.cu_num_logits_np[at])
                column = drawn.logprobs_tensors.logprobs[first : first + len(new), 0]
                self.logprobs[name] += column.tolist()
            if new and (new[-1] in TINY.eos_ids or len(new) == room):
                self.finish(name)
        return emitted
