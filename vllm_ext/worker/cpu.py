# SPDX-License-Identifier: Apache-2.0
"""Worker and runner for vLLM's CPU engine."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from proposers.cost_model import AttentionCost
from vllm_ext import hooks
from vllm_ext.attention.setup import describe_tree_attention, set_up_tree_attention
from vllm_ext.attention.timing import time_attention
from vllm_ext.config import read_cores
from vllm_ext.worker.beside import BesideThread, free_cores
from vllm_ext.worker.runner import TreeRunnerMixin

logger = init_logger("vllm.vllm_ext")

CALIBRATION_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class TreeCPUModelRunner(TreeRunnerMixin, CPUModelRunner):
    """CPU runner that verifies token trees."""

    touched = hooks.WORKER + hooks.CPU

    def _undrawn(self) -> list[int]:
        """Unfinished prompts: a CPU generator cannot be rolled back, so nothing is drawn."""
        if not self.input_batch.generators:
            return []
        count = self.input_batch.num_reqs
        return [int(i) for i in np.nonzero(self.discard_request_mask.np[:count])[0]]

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        hidden = {i: generators.pop(i) for i in self._undrawn() if i in generators}
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            generators.update(hidden)

    def _calc_spec_decode_metadata(
        self, num_draft_tokens: NDArray[np.int32], cu_num_scheduled_tokens: NDArray[np.int32]
    ) -> Any:
        """Stock; a step without drafts needs nothing but the last row of each request, and what
        the stock method does for it would be the price of being there.
        """
        if num_draft_tokens.any():
            return super()._calc_spec_decode_metadata(num_draft_tokens, cu_num_scheduled_tokens)
        last_rows = torch.from_numpy(cu_num_scheduled_tokens - 1)
        return replace(_undrafted(len(num_draft_tokens)), logits_indices=last_rows)


@functools.cache
def _undrafted(count: int) -> SpecDecodeMetadata:
    """Of a step of so many requests, none with a draft; the rows to sample are to be filled in."""
    none = torch.empty(0, dtype=torch.int32)
    ends = torch.arange(count + 1, dtype=torch.int32)
    return SpecDecodeMetadata(
        draft_token_ids=none,
        num_draft_tokens=[0] * count,
        cu_num_draft_tokens=torch.zeros(count, dtype=torch.int32),
        cu_num_sampled_tokens=ends[1:],
        target_logits_indices=none,
        bonus_logits_indices=ends[:-1],
        logits_indices=none,
    )


class TreeCPUWorker(CPUWorker):
    """CPU worker that runs :class:`TreeCPUModelRunner` with the tree-aware attention backend."""

    def init_device(self) -> None:
        """Stock, with our runner and attention backend in place."""
        hooks.require(TreeCPUModelRunner.touched)
        register_backend(
            AttentionBackendEnum.CPU_ATTN, "vllm_ext.attention.cpu.TreeCPUAttentionBackend"
        )
        with _runner_class(TreeCPUModelRunner):
            super().init_device()
        runner: Any = self.model_runner
        free = free_cores(read_cores(self.vllm_config))
        if free:
            runner.place_beside = BesideThread(max(free))
        runner.why_no_place = (
            "the engine's threads take all cores that it may use; reserve one by "
            "VLLM_CPU_NUM_OF_RESERVED_CPU=1 or VLLM_CPU_OMP_THREADS_BIND"
        )

    def compile_or_warm_up_model(self) -> Any:
        """Stock; then check tree attention on this machine and measure the cost of rows."""
        result = super().compile_or_warm_up_model()
        runner: Any = self.model_runner
        if runner._drafting is None:
            runner.trees_refused = set_up_tree_attention(runner)
            prior = runner.measure_forward(CALIBRATION_ROWS)
            attention = AttentionCost()
            if runner.trees_refused is None:
                attention = time_attention(runner)
            runner.start_drafting(prior, attention)
            rows = describe_tree_attention(runner)
            runner.announce(f"CPU_ATTN with tree rows ({rows})", prior)
        return result


@contextmanager
def _runner_class(runner: type) -> Iterator[None]:
    """Put ``runner`` where ``CPUWorker.init_device`` looks its runner class up."""
    original = cpu_worker.CPUModelRunner
    cpu_worker.CPUModelRunner = runner
    try:
        yield
    finally:
        cpu_worker.CPUModelRunner = original
