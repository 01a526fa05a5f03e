# SPDX-License-Identifier: Apache-2.0
"""The parts of Model Runner V2 with kernels in them, whatever runs the kernels.

That is a GPU or, in a process with ``TRITON_INTERPRET=1``, Triton's interpreter on CPU tensors. For
the interpreter three things are replaced, each with its reason below.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton import language as tl

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = DEVICE.type == "cpu"


@triton.jit
def _log1p(x: Any) -> Any:
    return tl.log(1.0 + x)


def _interpret(patch: pytest.MonkeyPatch) -> None:
    import vllm.triton_utils as found

    assert triton.knobs.runtime.interpret
    assert "vllm.v1.worker.gpu.buffer_utils" not in sys.modules, "V2 was imported without kernels"
    # vLLM's CPU build puts placeholders where its kernels are, unless Triton can compile for a CPU.
    # The interpreter need not compile. Modules take what they find when they are imported.
    patch.setattr(found, "triton", triton)
    patch.setattr(found, "tl", tl)
    # CUDA's mathematical library is not there; of it, the rejection sampler uses this.
    patch.setattr(found, "tldevice", SimpleNamespace(log1p=_log1p))


with ExitStack() as stack:
    if INTERPRETED:
        _interpret(stack.enter_context(pytest.MonkeyPatch.context()))
    from vllm.v1.worker.gpu import buffer_utils
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.sample.sampler import Sampler
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler
    from vllm.v1.worker.gpu.states import RequestState

if INTERPRETED:
    from vllm.v1.worker.cpu.buffer_utils import UvaBuffer

    # Pinned memory that a GPU sees too: vLLM's CPU worker replaces it by the same class.
    buffer_utils.UvaBuffer = UvaBuffer

__all__ = [
    "DEVICE",
    "BatchExecutionDescriptor",
    "GPUModelRunner",
    "InputBatch",
    "InputBuffers",
    "RequestState",
    "Sampler",
    "rejection_sampler",
]
