# SPDX-License-Identifier: Apache-2.0
"""Tree attention for vLLM's CUDA backends: subclasses of whichever one vLLM picks.

The subclass runs the stock kernel, and in a step with branching trees gives the rows of decoding
requests to the Triton kernel.  Classes are made when vLLM asks for them by name, so that a backend
whose library is not installed is never imported.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_ext.attention.tree_launch import CACHE_DTYPES, LAUNCH_ATTRIBUTE, TreeLaunch

logger = init_logger("vllm.vllm_ext")

BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
"""Backends of vLLM that get tree rows; their caches hold plain keys and values."""

FORWARD = ("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output")
"""Parameters of an implementation's ``forward`` that the subclass relies on."""

_HEAD_SIZES = range(16, 257)


class TreeAttention:
    """Goes before a CUDA attention implementation in the bases of a subclass."""

    def why_no_trees(self: Any) -> str | None:
        """Return why this layer cannot verify trees, or ``None`` if it can."""
        kind = getattr(self, "attn_type", AttentionType.DECODER)  # FlashInfer's is always this
        if kind != AttentionType.DECODER:
            return f"attention type {kind}"
        if self.alibi_slopes is not None:
            return "ALiBi positions"
        if getattr(self, "sinks", None) is not None:
            return "attention sinks"
        if getattr(self, "chunk_lookback", -1) >= 0:
            return "chunked attention"
        if self.kv_cache_dtype not in CACHE_DTYPES:
            return f"KV cache of type {self.kv_cache_dtype}"
        if self.head_size not in _HEAD_SIZES:
            return f"head size {self.head_size}"
        return None

    def forward(
        self: Any,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend; see the stock method."""
        launch: TreeLaunch | None = getattr(attn_metadata, LAUNCH_ATTRIBUTE, None)
        if launch is None or not launch.step.everything:
            attended: torch.Tensor = super().forward(  # type: ignore[misc]
                layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
            if launch is None:
                return attended
        keep = launch.step.step.keep and self.kv_sharing_target_layer_name is None
        if keep and key is not None and value is not None:
            rows = launch.step.step.rows
            # Copies: under torch.compile the buffers are reused by the next layer.
            launch.step.step.stash[layer.layer_name] = (
                key.index_select(0, rows),
                value.index_select(0, rows),
            )
        launch.attend(self, layer, query, kv_cache, output)
        return output


def register_tree_backends() -> None:
    """Put the tree-aware subclasses in place of the stock backends, in this process.

    A backend that somebody else has overridden is left alone.
    """
    for name in BACKENDS:
        backend = AttentionBackendEnum[name]
        if not backend.is_overridden():
            register_backend(backend, f"{__name__}.Tree{backend.value.rpartition('.')[2]}")


def tree_backend(stock: type) -> type:
    """A subclass of a stock backend whose implementation knows trees.

    Args:
        stock: vLLM's ``AttentionBackend``.

    Returns:
        The subclass, named ``Tree`` + its name; ``stock`` itself, with a log line, if its
        implementation's ``forward`` is not the one we know.  Then trees are refused at start-up.
    """
    stock_impl: Any = stock.get_impl_cls()  # type: ignore[attr-defined]
    accepted = list(inspect.signature(stock_impl.forward).parameters)
    if accepted[: len(FORWARD)] != list(FORWARD):
        logger.warning("vllm-ext: %s.forward takes %s", stock_impl.__name__, accepted)
        return stock
    impl = type(f"Tree{stock_impl.__name__}", (TreeAttention, stock_impl), {"__module__": __name__})
    return type(
        f"Tree{stock.__name__}",
        (stock,),
        {"__module__": __name__, "get_impl_cls": staticmethod(lambda: impl)},
    )


def __getattr__(name: str) -> Any:
    """Make a backend class when it is first asked for (PEP 562)."""
    for backend in BACKENDS:
        path = AttentionBackendEnum[backend].value
        if name == f"Tree{path.rpartition('.')[2]}":
            made = tree_backend(resolve_obj_by_qualname(path))
            globals()[name] = made
            return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
