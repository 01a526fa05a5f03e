# SPDX-License-Identifier: Apache-2.0
"""Equal weights are held once, others are left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_ext.worker.shared_weights import share_equal_weights

WIDTH = 8


class Decoder(torch.nn.Module):
    def __init__(self, layers: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(16, WIDTH)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.requires_grad_(False)

    def forward(self, tokens: Any) -> Any:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return hidden


TOKENS = torch.arange(16)


def test_an_early_exit_holds_only_its_last_layer() -> None:
    target, draft = Decoder(4, seed=0), Decoder(3, seed=1)
    draft.embed.load_state_dict(target.embed.state_dict())
    # In another place: numbers of layers do not count.
    draft.layers[0].load_state_dict(target.layers[0].state_dict())
    draft.layers[1].load_state_dict(target.layers[3].state_dict())
    before = draft(TOKENS)
    saved = share_equal_weights(draft, target)
    assert saved == 4 * (16 * WIDTH + 2 * (WIDTH * WIDTH + WIDTH))
    assert draft.embed.weight.data_ptr() == target.embed.weight.data_ptr()
    assert draft.layers[1].weight.data_ptr() == target.layers[3].weight.data_ptr()
    own = {p.data_ptr() for p in draft.layers[2].parameters()}
    assert not own & {p.data_ptr() for p in target.parameters()}
    torch.testing.assert_close(draft(TOKENS), before, rtol=0, atol=0)
    assert share_equal_weights(draft, target) == 0


@pytest.mark.parametrize("change", ["last element", "dtype", "strides", "name"])
def test_what_differs_is_not_shared(change: str) -> None:
    target = Decoder(1, seed=0)
    draft = Decoder(1, seed=0)
    if change == "last element":
        for parameter in draft.parameters():
            parameter.view(-1)[-1] += 1
    elif change == "dtype":
        draft.double()
        target.double()
        draft.float()
    elif change == "strides":
        for parameter in draft.parameters():
            storage = torch.empty((*parameter.shape, 2))
            storage[..., 0] = parameter
            parameter.data = storage[..., 0]
    else:
        draft.others = draft.layers
        draft.more = draft.embed
        del draft.layers, draft.embed
    assert share_equal_weights(draft, target) == 0
    # Control: without the change all of it is.
    whole = Decoder(1, seed=0)
    size = sum(4 * parameter.numel() for parameter in whole.parameters())
    assert share_equal_weights(whole, Decoder(1, seed=0)) == size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_any_dtype(dtype: torch.dtype) -> None:
    target, draft = Decoder(1, seed=0), Decoder(1, seed=0)
    for model in (target, draft):
        for name, parameter in list(model.layers[0].named_parameters()):
            whole = torch.nn.Parameter((8 * parameter).to(dtype), requires_grad=False)
            setattr(model.layers[0], name, whole)
    assert share_equal_weights(draft.layers, target.layers) == dtype.itemsize * (WIDTH**2 + WIDTH)


def test_weights_that_a_kernel_took_away_are_not_compared() -> None:
    target, draft = Decoder(1, seed=0), Decoder(1, seed=0)
    for model in (target, draft):
        for parameter in model.parameters():
            parameter.data = torch.empty(0)
    assert share_equal_weights(draft, target) == 0
