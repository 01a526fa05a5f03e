# SPDX-License-Identifier: Apache-2.0
"""An output layer for some tokens; models whose logits come about otherwise are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
)

from vllm_ext.worker.narrow_head import NarrowError, narrow

VOCAB, HIDDEN = 40, 32
TOKENS = torch.tensor([3, 4, 9, 20, 39])


class Head(torch.nn.Module):
    """As vLLM leaves an output layer."""

    tp_size = 1

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn((VOCAB, HIDDEN), generator=torch.Generator().manual_seed(1))
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.quant_method: Any = UnquantizedEmbeddingMethod()
        self.quant_method.process_weights_after_loading(self)


class Model(torch.nn.Module):
    """Logits by one processor, and by what a subclass adds."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.head = Head()
        with set_current_vllm_config(VllmConfig()):
            self.processor = LogitsProcessor(VOCAB, **options)
        self.processor.head_dtype = None

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.processor(self.head, hidden)
        return found


class Shifted(Model):
    """Changes its logits behind the processor."""

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().compute_logits(hidden) + torch.arange(VOCAB)


class Biased(Model):
    """Gives its processor a bias, which a narrowed layer would not have."""

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.processor(self.head, hidden, torch.ones(VOCAB))
        return found


class Twice(Model):
    """Calls its processor twice."""

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().compute_logits(hidden) + super().compute_logits(hidden)


@pytest.mark.parametrize("options", [{}, {"scale": 0.25}, {"soft_cap": 3.0}])
def test_logits_of_some_tokens(options: dict[str, float]) -> None:
    model = Model(**options)
    before = model.head.weight.clone()
    prepared: list[Any] = []
    logits = narrow(model, TOKENS, HIDDEN, torch.float32, prepared.append)
    hidden = torch.randn((6, HIDDEN), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(logits(hidden), model.compute_logits(hidden)[:, TOKENS])
    assert [layer.weight.shape for layer in prepared] == [(len(TOKENS), HIDDEN)]
    assert torch.equal(model.head.weight, before)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Shifted, "not those of the narrowed layer"),
        (Biased, "more than a layer and hidden states"),
        (Twice, "processor 2 times"),
    ],
)
def test_other_models_are_refused(kind: type[Model], message: str) -> None:
    with pytest.raises(NarrowError, match=message):
        narrow(kind(), TOKENS, HIDDEN, torch.float32)


def test_a_quantized_layer_and_two_processors_are_refused() -> None:
    model = Model()
    model.head.quant_method = _Quantized()
    with pytest.raises(NarrowError, match="is quantized"):
        narrow(model, TOKENS, HIDDEN, torch.float32)
    model = Model()
    model.second = Model().processor
    with pytest.raises(NarrowError, match="2 logits processors"):
        narrow(model, TOKENS, HIDDEN, torch.float32)


class _Quantized:
    def apply(self, layer: Any, hidden: torch.Tensor, bias: Any = None) -> torch.Tensor:
        found: torch.Tensor = hidden @ layer.weight.T
        return found
