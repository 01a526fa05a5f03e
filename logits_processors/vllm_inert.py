# SPDX-License-Identifier: Apache-2.0
"""Processors that do nothing, for engines in which this package is switched off.

vLLM loads the entry point all the same and wants a processor of its runner's kind from it.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor.interface import BatchUpdate
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as V2LogitsProcessor,
)


class InertV1Processor(V1LogitsProcessor):
    """Nothing, for Model Runner V1."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        """True: not even called where all requests are greedy."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Keep nothing."""

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Change nothing."""
        return logits


class InertV2Processor(V2LogitsProcessor):
    """Nothing, for Model Runner V2."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        pass

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Take over no request."""
        return False

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        """Change nothing."""
        return logits
