# SPDX-License-Identifier: Apache-2.0
"""A model's output layer for some tokens only (`vllm_ext.draft_vocab`).

vLLM's models compute logits in one call of a `LogitsProcessor` with their output layer, whatever
the layer is called and whether it is tied. So one call is listened to, and repeated with a copy of
that layer that has the wanted rows; scale and soft cap stay the processor's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Logits [rows, tokens] of final hidden states [rows, hidden]."""

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class NarrowError(RuntimeError):
    """The model's output layer cannot be narrowed; the message says why."""


@torch.inference_mode()
def narrow(
    model: Any,
    tokens: torch.Tensor,
    hidden_size: int,
    dtype: torch.dtype,
    prepare: Callable[[torch.nn.Module], None] = lambda layer: None,
) -> Logits:
    """Logits of some tokens.

    Args:
        model: loaded by vLLM.
        tokens: ids, int64 [n], on the model's device.
        hidden_size: of its final hidden states.
        dtype: of them.
        prepare: called with the narrowed layer.

    Raises:
        NarrowError: its logits come about in another way, or are others.
    """
    processors = [m for m in model.modules() if isinstance(m, LogitsProcessor)]
    if len(processors) != 1:
        raise NarrowError(f"it has {len(processors)} logits processors")
    processor = processors[0]
    heard: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    listening = processor.register_forward_pre_hook(
        lambda module, args, kwargs: heard.append((args, kwargs)), with_kwargs=True
    )
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((2, hidden_size), generator=generator).to(tokens.device, dtype)
    try:
        every = model.compute_logits(hidden)
    finally:
        listening.remove()
    if len(heard) != 1:
        raise NarrowError(f"it calls its logits processor {len(heard)} times")
    args, kwargs = heard[0]
    if kwargs or len(args) != 2:
        raise NarrowError("it gives its logits processor more than a layer and hidden states")
    layer = _rows(args[0], tokens)
    prepare(layer)

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = processor(layer, hidden)
        return found

    wanted, found = every[:, tokens].float(), logits(hidden).float()
    tolerance = _TOLERANCE.get(dtype, 1e-1) * float(wanted.abs().max())
    if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=0, atol=tolerance):
        raise NarrowError("its logits are not those of the narrowed layer")
    return logits


def _rows(layer: Any, tokens: torch.Tensor) -> Any:
    """A copy of an output layer with some rows."""
    if not isinstance(layer.quant_method, UnquantizedEmbeddingMethod):
        raise NarrowError(f"its output layer is quantized ({type(layer.quant_method).__name__})")
    narrowed = copy.copy(layer)
    narrowed._parameters = {
        name: None
        if parameter is None
        else torch.nn.Parameter(parameter.data[tokens].contiguous(), requires_grad=False)
        for name, parameter in layer._parameters.items()
    }
    # What vLLM made of the whole weight for its kernels.
    vars(narrowed).pop("cpu_linear", None)
    narrowed.quant_method.process_weights_after_loading(narrowed)
    return narrowed
