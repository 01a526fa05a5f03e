# SPDX-License-Identifier: Apache-2.0
"""A second forward pass beside the target's, on a CUDA stream of its own.

Kernels of two streams run side by side where the first leaves multiprocessors free, as the target's
step of a few rows does. A thread launches the draft model's, because a pass ends with a copy to the
host that only that thread shall wait for. Its forward context is its own (`beside`); the pass is
not compiled and replays no graph, both of which belong to the target's thread.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

T = TypeVar("T")

_SHARED_WORKSPACE = ("MoE", "MLA", "FlashInfer")
"""In names of layers and of attention: vLLM gives all of a kind one workspace per process."""


class BesideStream:
    """One thread, whose kernels go to a stream of their own.

    Args:
        device: of both models.
    """

    where = "on a stream of its own"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        self._pool = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="vllm-ext-draft",
            initializer=torch.cuda.set_device,
            initargs=(device,),
        )

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Run `job` in the thread; its kernels follow those that the caller has launched so far.

        When the job has ended, so have its kernels.
        """
        begun = torch.cuda.Event()  # type: ignore[no-untyped-call]
        begun.record(torch.cuda.current_stream(self._device))

        def run() -> T:
            if self._stream is None:
                self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(begun)
                try:
                    return job()
                finally:
                    self._stream.synchronize()

        return self._pool.submit(run)

    def finish(self) -> None:
        """Wait for the kernels that the calling thread has launched."""
        torch.cuda.current_stream(self._device).synchronize()


def why_not_on_stream(model: torch.nn.Module) -> str | None:
    """Why a model cannot run beside another in one process, or ``None``."""
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(module, LinearBase) and not isinstance(method, UnquantizedLinearMethod):
            # Marlin, for one, keeps a buffer per stream, and vLLM allows no new one after start-up.
            return f"layer {name} is quantized ({type(method).__name__})"
        for kind in (type(module).__name__, type(getattr(module, "impl", None)).__name__):
            if any(part in kind for part in _SHARED_WORKSPACE):
                return f"layer {name} ({kind}) works in memory that both models share"
    return None
