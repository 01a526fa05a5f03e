# SPDX-License-Identifier: Apache-2.0
"""Worker and runner for vLLM's CUDA engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_tp_group
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from proposers.cost_model import AttentionCost
from proposers.merging import WIDTH
from vllm_ext import hooks
from vllm_ext.worker.beside_stream import BesideStream
from vllm_ext.worker.device_walk import DeviceWalk, chunk_rows, to_host
from vllm_ext.worker.drafting import Candidates
from vllm_ext.worker.observe import top_candidates
from vllm_ext.worker.rowwise import why_sequential
from vllm_ext.worker.runner import TreeRunnerMixin
from vllm_ext.worker.step import AttentionStep, Step
from vllm_ext.worker.walk import WalkResult

if TYPE_CHECKING:
    from vllm_ext.attention.cuda_move import CacheMover

CALIBRATION_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class TreeGPURunnerMixin(TreeRunnerMixin):
    """What a GPU does its own way: the trees go to the Triton kernel, the walk stays on the device.

    Attributes:
        processors: multiprocessors of the device.
        mover: moves accepted nodes within the caches, if it passed its test.
        context_routes: what is said of layers whose contexts FlashAttention reads.
    """

    touched = hooks.WORKER + hooks.CUDA
    walk_is_timed = False
    learns_later = True
    partial_trees = False  # the kernel's rows are the tree's; a few rows more cost a GPU little
    processors = 1
    mover: CacheMover | None = None
    context_routes: Sequence[str] = ()

    _device_step: Any = None

    def _check_and_update_cudagraph_mode(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Under speculation vLLM captures full graphs for requests of 1 + num_speculative_tokens
        # rows each, which trees of many sizes never have, and rounds all sizes up to multiples of
        # that: one row would be computed as 33. So graphs are chosen as without drafts: a step that
        # has none replays a full one, padded no further than there.
        self.uniform_decode_query_len = self.cudagraph_dispatcher.uniform_decode_query_len = 1
        return super()._check_and_update_cudagraph_mode(*args, **kwargs)  # type: ignore[misc]

    def _prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        self._device_step = None
        step: Step = self._step
        if step.attention is not None:
            from vllm_ext.attention.tree_launch import DeviceStep

            step.attention.keep = self.mover is None
            count = self.input_batch.num_reqs
            self._device_step = DeviceStep.build(
                step,
                self.query_start_loc.np[: count + 1],
                self.input_batch.num_computed_tokens_cpu[:count],
                self.processors,
            )
        return prepared

    def _determine_batch_execution_and_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._step is not None and self._step.attention is not None:
            # A full CUDA graph replays the stock attention kernel; piecewise graphs leave
            # attention out.
            kwargs["force_uniform_decode"] = False
        return super()._determine_batch_execution_and_padding(*args, **kwargs)  # type: ignore[misc]

    def _build_attention_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        built = super()._build_attention_metadata(*args, **kwargs)
        if self._step is not None and self._device_step is not None:
            from vllm_ext.attention.tree_launch import LAUNCH_ATTRIBUTE, TreeLaunch

            count = self.input_batch.num_reqs
            for gid, group in enumerate(self.kv_cache_config.kv_cache_groups):
                table = self.input_batch.block_table[gid].get_device_tensor(count)
                launch = TreeLaunch(self._device_step, table)
                for name in group.layer_names:
                    setattr(built[0][name], LAUNCH_ATTRIBUTE, launch)
        return built

    def _commit(self: Any, step: AttentionStep, paths: Sequence[Sequence[int]]) -> None:
        if self.mover is None:
            super()._commit(step, paths)
        else:
            self.mover.commit(step, paths, self._slot_mappings_by_layer())

    def attach_trees(
        self: Any,
        metadata: Any,
        step: Step,
        query_starts: Any,
        bases: Any,
        block_table: torch.Tensor,
    ) -> None:
        """See the base class."""
        from vllm_ext.attention.tree_launch import LAUNCH_ATTRIBUTE, DeviceStep, TreeLaunch

        super().attach_trees(metadata, step, query_starts, bases, block_table)
        assert step.attention is not None
        step.attention.rows = step.attention.rows.to(self.device, non_blocking=True)
        device_step = DeviceStep.build(step, query_starts, bases, self.processors)
        setattr(metadata, LAUNCH_ATTRIBUTE, TreeLaunch(device_step, block_table))

    def _match(self: Any, logits: torch.Tensor, step: Step) -> tuple[Candidates | None, WalkResult]:
        metadata = self.input_batch.sampling_metadata
        if not any(step.trees) or why_sequential(self.sampler, metadata) is not None:
            return super()._match(logits, step)
        chunk = chunk_rows(logits.shape[1])
        begins = range(0, len(logits), chunk)
        parts = [top_candidates(logits[row : row + chunk], WIDTH) for row in begins]
        ids, probs = (torch.cat(part) for part in zip(*parts, strict=True))
        walked = DeviceWalk(logits, metadata, step.trees, step.starts)
        self._catch_up()
        path, host_ids, host_probs = to_host(walked.path, ids, probs)
        return Candidates(host_ids, host_probs), walked.finish(path)


class TreeGPUModelRunner(TreeGPURunnerMixin, GPUModelRunner):
    """CUDA runner that verifies token trees."""


class TreeGPUWorker(Worker):
    """CUDA worker that runs :class:`TreeGPUModelRunner` with tree-aware attention backends."""

    def init_device(self) -> None:
        """Stock, with our runner and attention backends in place."""
        hooks.require(TreeGPUModelRunner.touched)
        if importlib.util.find_spec("triton") is not None:
            from vllm_ext.attention.cuda import register_tree_backends

            register_tree_backends()
        with _runner_class(TreeGPUModelRunner):
            super().init_device()
        runner: Any = self.model_runner
        runner.place_beside = BesideStream(self.device)

    def compile_or_warm_up_model(self) -> Any:
        """Stock; then check tree attention on this machine and measure the cost of rows."""
        result = super().compile_or_warm_up_model()
        runner: Any = self.model_runner
        if runner._drafting is None:
            runner.processors = torch.cuda.get_device_properties(self.device).multi_processor_count
            runner.trees_refused = self._set_up_trees()
            prior = runner.measure_forward(CALIBRATION_ROWS)
            runner.start_drafting(prior, AttentionCost())
            names = {group.backend.get_name() for groups in runner.attn_groups for group in groups}
            trees = ""
            if runner.trees_refused is None:
                trees = ", ".join([" with tree rows in Triton", *runner.context_routes])
            runner.announce("+".join(sorted(names)) + trees, prior)
        return result

    def _set_up_trees(self) -> str | None:
        """Why branching trees are refused, the same on every rank."""
        reason: str | None = "Triton is not installed"
        if importlib.util.find_spec("triton") is not None:
            from vllm_ext.attention.cuda_setup import set_up_tree_attention

            reason = set_up_tree_attention(self.model_runner)
        return agreed(reason)


@contextmanager
def _runner_class(runner: type) -> Iterator[None]:
    """Put ``runner`` where the stock worker imports its runner class from."""
    original = gpu_model_runner.GPUModelRunner
    gpu_model_runner.GPUModelRunner = runner
    try:
        yield
    finally:
        gpu_model_runner.GPUModelRunner = original


def agreed(reason: str | None) -> str | None:
    """The first refusal of any tensor-parallel rank: one decides for all."""
    group = get_tp_group()
    reasons: list[str | None] = [reason]
    if group.world_size > 1:
        reasons *= group.world_size
        torch.distributed.all_gather_object(reasons, reason, group=group.cpu_group)
    return next(filter(None, reasons), None)
