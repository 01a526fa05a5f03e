# SPDX-License-Identifier: Apache-2.0
"""A CPU worker that takes the CUDA path: device walk, wrapped backend, Triton kernel (interpreted).

Stock here is a torch implementation over the cache layout that vLLM's CUDA backends share; the
engine around it, scheduler, runner, metadata and sampler, is vLLM's own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.cpu_worker import CPUWorker

from proposers.cost_model import AttentionCost
from tests.vllm_ext.attention.flash_standin import flash_attn_varlen_func
from vllm_ext.attention import flash_context
from vllm_ext.attention.cuda import tree_backend
from vllm_ext.attention.cuda_setup import set_up_tree_attention
from vllm_ext.attention.route import ALWAYS
from vllm_ext.attention.tree_launch import ROUTE_ATTRIBUTE
from vllm_ext.worker.commit import displaced
from vllm_ext.worker.cpu import TreeCPUModelRunner, _runner_class
from vllm_ext.worker.gpu import TreeGPURunnerMixin


class PlainImpl(CPUAttentionBackendImpl):
    """Causal attention over [blocks, kv_heads, page, 2 * head_size], in torch."""

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: Any, slot_mapping: Any
    ) -> None:
        page = kv_cache.shape[2]
        used = slot_mapping >= 0
        block, offset = slot_mapping[used] // page, slot_mapping[used] % page
        stored = torch.cat([key, value], dim=-1)[: len(used)][used]
        kv_cache[block, :, offset] = stored

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if attn_metadata is None:  # profiling
            return output
        page, group = kv_cache.shape[2], self.num_heads // self.num_kv_heads
        starts = attn_metadata.query_start_loc.tolist()
        for request, length in enumerate(attn_metadata.seq_lens.tolist()):
            rows = slice(starts[request], starts[request + 1])
            slot = torch.arange(length)
            block = attn_metadata.block_table[request].long()[slot // page]
            stored = kv_cache[block, :, slot % page].repeat_interleave(group, dim=1)
            keys, values = stored.split(self.head_size, dim=-1)
            score = torch.einsum("qhd,khd->hqk", query[rows], keys) * self.scale
            size = rows.stop - rows.start
            hidden = torch.arange(length - size, length)[:, None] < slot[None, :]
            weight = score.masked_fill(hidden, float("-inf")).softmax(dim=-1)
            output[rows] = torch.einsum("hqk,khd->qhd", weight, values)
        return output


class PlainBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> Any:
        return PlainImpl


TreePlainBackend = tree_backend(PlainBackend)


class TritonRunner(TreeGPURunnerMixin, TreeCPUModelRunner):
    launches = moved = 0

    def _commit(self: Any, step: Any, paths: Any) -> None:
        self.moved += self.mover is not None and any(displaced(step, paths))
        super()._commit(step, paths)

    def _build_attention_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.launches += self._device_step is not None
        return super()._build_attention_metadata(*args, **kwargs)


class TritonWorker(CPUWorker):
    """The CUDA worker's start-up, on a CPU."""

    flash_calls = 0

    def init_device(self) -> None:
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.TreePlainBackend")
        with _runner_class(TritonRunner):
            super().init_device()

    def compile_or_warm_up_model(self) -> Any:
        result = super().compile_or_warm_up_model()
        runner: Any = self.model_runner
        if runner._drafting is None:
            runner.trees_refused = set_up_tree_attention(runner)
            prior = runner.measure_forward((1, 8))
            runner.start_drafting(prior, AttentionCost())
            runner.announce("Triton, interpreted", prior)
        return result

    def state(self) -> dict[str, Any]:
        """What happened so far, as plain types."""
        runner: Any = self.model_runner
        return {
            "refused": runner.trees_refused,
            "launches": int(runner.launches),
            "moved": int(runner.moved),
            "flash_calls": self.flash_calls,
            **runner._counters.snapshot(),
        }

    def leave_nodes_where_they_are(self) -> None:
        """Break the commit: what was accepted stays in the slots of the tree."""
        runner: Any = self.model_runner
        runner.mover.commit = lambda *step: None

    def shorten_contexts(self) -> None:
        """Break the contexts that FlashAttention reads: each lacks its last token."""
        from vllm_ext.attention.tree_launch import DeviceStep

        real = DeviceStep.contexts

        def shorter(step: DeviceStep, device: torch.device) -> Any:
            whole = real(step, device)
            return replace(whole, bases=whole.bases - 1, longest=whole.longest - 1)

        DeviceStep.contexts = shorter  # type: ignore[method-assign]

    def hide_ancestors(self) -> None:
        """Break the kernel's mask: every row sees every row before it."""
        from vllm_ext.attention.tree_plan import RowTree

        RowTree.build = classmethod(  # type: ignore[method-assign, assignment]
            lambda cls, request, start, base, visible, depths: cls.chain(
                request, start, base, len(depths)
            )
        )


class FlashWorker(TritonWorker):
    """The same where vLLM has FlashAttention, and every context goes there."""

    def compile_or_warm_up_model(self) -> Any:
        PlainImpl.vllm_flash_attn_version = 3  # type: ignore[attr-defined]
        flash_context.flash_attention = lambda: self._flash
        result = super().compile_or_warm_up_model()
        runner: Any = self.model_runner
        for layer in runner.compilation_config.static_forward_context.values():
            setattr(layer.impl, ROUTE_ATTRIBUTE, ALWAYS)
        self.flash_calls = 0
        return result

    def _flash(self, **given: Any) -> Any:
        self.flash_calls += 1
        return flash_attn_varlen_func(**given)
