# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vllm_ext.distill import grouped


def attended(function: Any, new: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    chance = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, new, 8, generator=chance)
    key, value = (torch.randn(2, 3, 5, 8, generator=chance) for _ in range(2))
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    found: torch.Tensor = function(module, query, key, value, mask, scaling=0.3)[0]
    return found


@pytest.mark.parametrize("new", [1, 5])
def test_the_numbers_are_transformers(new: int) -> None:
    wanted = attended(sdpa_attention_forward, new)
    torch.testing.assert_close(attended(grouped.attention, new), wanted)


def test_a_mask_is_obeyed() -> None:
    """Masked keys must not be seen: those calls are left to transformers."""
    mask = torch.tensor([True, False, True, True, False])[None, None, None]
    wanted = attended(sdpa_attention_forward, 1, mask)
    torch.testing.assert_close(attended(grouped.attention, 1, mask), wanted)
    assert not torch.allclose(wanted, attended(grouped.attention, 1))


def test_one_token_does_not_go_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor would the comparison above say anything if it did."""

    def forbidden(*args: Any, **options: Any) -> None:
        raise AssertionError("expanded")

    monkeypatch.setattr(grouped, "sdpa_attention_forward", forbidden)
    attended(grouped.attention, 1)
    with pytest.raises(AssertionError, match="expanded"):
        attended(grouped.attention, 2)


def test_the_target_attends_so(target: Any) -> None:
    assert target.config._attn_implementation == grouped.NAME


def test_a_model_that_attends_otherwise_is_left_alone(target: Any) -> None:
    config = SimpleNamespace(_attn_implementation="eager")
    grouped.use(SimpleNamespace(config=config))
    assert config._attn_implementation == "eager"
