# SPDX-License-Identifier: Apache-2.0
"""Worker and runner for vLLM's CUDA engine.

Branching trees are not verified on CUDA yet: the drafter sends its best chain, which the stock
attention backends verify, and the walk keeps every sampling feature.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from vllm_ext import hooks
from vllm_ext.worker.runner import TreeRunnerMixin

CALIBRATION_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class TreeGPUModelRunner(TreeRunnerMixin, GPUModelRunner):
    """CUDA runner that verifies chains with the walk."""

    trees_refused = "no tree attention for CUDA yet"


class TreeGPUWorker(Worker):
    """CUDA worker that runs :class:`TreeGPUModelRunner`."""

    def _make_model_runner(self) -> Any:
        hooks.require(hooks.WORKER)
        return TreeGPUModelRunner(self.vllm_config, self.device)

    def compile_or_warm_up_model(self) -> Any:
        """Stock; then measure the cost of rows."""
        result = super().compile_or_warm_up_model()
        runner: Any = self.model_runner
        if runner._drafting is None:
            prior = runner.measure_forward(CALIBRATION_ROWS)
            runner.start_drafting(prior)
            runner.announce("stock attention, chains only", prior)
        return result
