# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, Gemma3TextConfig

from vllm_ext.distill.filled_cache import FilledLayer, filled_cache


def hidden(target: Any, cache: DynamicCache) -> torch.Tensor:
    parts = torch.split(torch.arange(2, 26).reshape(2, 12), [5, 1, 1, 5], dim=1)
    with torch.inference_mode():
        return torch.cat(
            [target.model(part, past_key_values=cache).last_hidden_state for part in parts], dim=1
        )


def test_the_target_sees_what_it_sees_in_transformers_own(target: Any) -> None:
    found = hidden(target, filled_cache(target.config, 12))
    wanted = hidden(target, DynamicCache(config=target.config))
    torch.testing.assert_close(found, wanted)


def test_the_comparison_can_fail(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old keys that are not where they were must be seen."""
    honest = FilledLayer.update

    def shifted(self: FilledLayer, *new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = honest(self, *new)
        return keys.roll(1, dims=2), values

    wanted = hidden(target, DynamicCache(config=target.config))
    monkeypatch.setattr(FilledLayer, "update", shifted)
    assert not torch.allclose(hidden(target, filled_cache(target.config, 12)), wanted)


def test_nothing_is_copied_twice(target: Any) -> None:
    cache = filled_cache(target.config, 12)
    with torch.inference_mode():
        target.model(torch.tensor([[3, 4]]), past_key_values=cache)
        before = cache.layers[0].keys
        target.model(torch.tensor([[5]]), past_key_values=cache)
    assert before is not None
    assert cache.layers[0].keys is not None
    assert cache.layers[0].keys.data_ptr() == before.data_ptr()
    assert cache.get_seq_length() == 3


def test_there_is_no_room_for_more() -> None:
    layer = FilledLayer(2)
    new = torch.zeros(1, 1, 2, 4)
    layer.update(new, new)
    with pytest.raises(ValueError, match="a cache for 2 tokens was given 4"):
        layer.update(new, new)


def test_layers_with_a_window_stay_transformers() -> None:
    config = Gemma3TextConfig(
        num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=4
    )
    kinds = [type(layer).__name__ for layer in filled_cache(config, 8).layers]
    assert kinds == ["DynamicSlidingWindowLayer", "FilledLayer"]
