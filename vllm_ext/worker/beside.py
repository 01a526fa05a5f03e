# SPDX-License-Identifier: Apache-2.0
"""A second forward pass in the same process, beside the target's, on a CPU core of its own.

Three things in vLLM's CPU engine are made for one pass at a time:

* the forward context is a global. While a thread drafts, a `PerThreadContext` stands in its place;
* the kernels of linear layers (oneDNN) and of attention share one scratchpad and one cache of
  primitives in the whole process, so two threads in them would corrupt each other's results. A
  draft model that is loaded under `reentrant_layers` multiplies by torch instead (whose oneDNN is
  another), with weights that `lay_out` has laid out for it, and its rows go to this package's tree
  attention;
* threads are bound to the target's cores. The drafting thread is bound to another one.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from vllm import _custom_ops
from vllm.forward_context import (
    create_forward_context,
    get_forward_context,
    override_forward_context,
)
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

logger = logging.getLogger("vllm.vllm_ext")

T = TypeVar("T")

_own = threading.local()


class PerThreadContext:
    """vLLM's forward context, but for threads that have one of their own.

    Args:
        shared: the context of all other threads.
    """

    def __init__(self, shared: Any) -> None:
        object.__setattr__(self, "_shared", shared)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._now(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._now(), name, value)

    def _now(self) -> Any:
        return getattr(_own, "context", None) or self.__dict__["_shared"]


@contextmanager
def per_thread_context() -> Iterator[None]:
    """Within a forward context: let other threads have contexts of their own."""
    with override_forward_context(PerThreadContext(get_forward_context())):
        yield


@contextmanager
def own_context(
    config: Any, metadata: dict[str, Any] | None, slots: dict[str, Any]
) -> Iterator[None]:
    """A forward context of this thread alone, while `per_thread_context` holds in another.

    Args:
        config: vLLM's configuration with the model that runs.
        metadata: attention metadata by layer; ``None`` for dummy rows, which attend to nothing.
        slots: slot mapping by layer.
    """
    # What is compiled is left out: its guards and buffers belong to one thread.
    _own.context = create_forward_context(metadata, config, slot_mapping=slots, skip_compiled=True)
    try:
        yield
    finally:
        _own.context = None


@contextmanager
def reentrant_layers() -> Iterator[None]:
    """While a model is loaded: give its linear layers torch's kernels."""
    before = _custom_ops._supports_onednn
    _custom_ops._supports_onednn = False
    try:
        yield
    finally:
        _custom_ops._supports_onednn = before


def lay_out(model: torch.nn.Module) -> None:
    """Lay the weights of layers that multiply by torch out once, not anew in every product.

    That is what torch's compiler does with weights that do not change. Layers that it has no
    product for, and those that vLLM gave a kernel of its own, stay as they are.
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        plain = isinstance(method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod)
        if plain and hasattr(module, "cpu_linear") and getattr(module, "weight", None) is not None:
            _lay_out(module)


def _lay_out(layer: Any) -> None:
    weight = layer.weight.detach()
    if weight.ndim != 2 or not weight.numel():  # the latter: vLLM has packed it
        return
    try:
        laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, None)

        def product(x: torch.Tensor, _: Any, bias: torch.Tensor | None) -> torch.Tensor:
            found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                x, laid_out, bias, "none", [], ""
            )
            return found

        x = torch.linspace(-1, 1, weight.shape[1]).to(weight.dtype).expand(2, -1).contiguous()
        bias = getattr(layer, "bias", None)
        wanted = torch.nn.functional.linear(x, weight, bias)
        if torch.allclose(product(x, None, bias), wanted, rtol=1e-2, atol=1e-2):
            layer.cpu_linear = product
    except (RuntimeError, AttributeError) as error:
        logger.debug("vllm-ext: %s multiplies weights as they are: %s", type(layer).__name__, error)


def why_not_reentrant(model: torch.nn.Module) -> str | None:
    """Why a model loaded under `reentrant_layers` cannot run in two threads, or ``None``."""
    from vllm_ext.attention.cpu import TreeCPUAttentionBackendImpl

    for name, module in model.named_modules():
        kind = type(module).__name__
        method = getattr(module, "quant_method", None)
        if isinstance(module, LinearBase) and not isinstance(method, UnquantizedLinearMethod):
            return f"layer {name} is quantized ({type(method).__name__})"
        if "MoE" in kind:
            return f"layer {name} ({kind}) has experts"
        impl = getattr(module, "impl", None)
        if impl is None:
            continue
        if not isinstance(impl, TreeCPUAttentionBackendImpl):
            return f"layer {name} attends by {type(impl).__name__}"
        reason = impl.why_no_trees()
        if reason is not None:
            return f"layer {name}: {reason}"
    return None


def why_not_one_code(model: torch.nn.Module, target: torch.nn.Module) -> str | None:
    """Why a model cannot run uncompiled beside a compiled target, or ``None``.

    Where vLLM compiles without a function of its own (`VLLM_USE_AOT_COMPILE=0`), the class of a
    compiled module has the compiled code in place of its ``forward`` while the module runs, and a
    model with a module of that class would run it too.
    """
    swapped = {
        type(module)
        for module in target.modules()
        if getattr(module, "_compiled_bytecode", None) is not None
    }
    for module in model.modules():
        if type(module) in swapped:
            return f"vLLM exchanges the code of {type(module).__name__} while the target runs"
    return None


class BesideThread:
    """One thread, bound to a core.

    Args:
        core: its number.
    """

    def __init__(self, core: int) -> None:
        self.core = core
        self._pool = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="vllm-ext-draft",
            initializer=_settle,
            initargs=(core,),
        )

    @property
    def where(self) -> str:
        """For the log."""
        return f"on core {self.core}"

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Run ``job`` in the thread."""
        return self._pool.submit(job)

    def finish(self) -> None:
        """Nothing to wait for: what the calling thread has started on a CPU, it has done."""


def _settle(core: int) -> None:
    """Make the calling thread a single OpenMP thread on ``core``."""
    torch.get_num_threads()  # torch sets a new thread's number of threads at its first question
    # Not torch.set_num_threads, which also counts for the target's thread in MKL.
    set_num_threads = ctypes.CDLL(None).omp_set_num_threads
    # OpenMP binds a thread to the target's cores at its first parallel region: that comes first.
    set_num_threads(2)
    torch.ones(1 << 17).sum()
    set_num_threads(1)
    os.sched_setaffinity(0, {core})


def free_cores(allowed: set[int]) -> set[int]:
    """Of the cores that the engine may use, those that the calling thread is not bound to."""
    return allowed - os.sched_getaffinity(0)
