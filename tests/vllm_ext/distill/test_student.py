# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_ext.distill.errors import DistillError
from vllm_ext.distill.student import (
    check_target,
    early_exit,
    head_logits,
    load_target,
    make_student,
    save_student,
    spread,
    stored_dtype,
)
from vllm_ext.identity import tokenizer_hash

TOKENS = torch.arange(3, 19)[None]


def test_spread() -> None:
    assert spread(1, 3) == [0]
    assert spread(2, 3) == [0, 2]
    assert spread(4, 30) == [0, 10, 19, 29]
    assert spread(29, 30)[-1] == 29
    assert len(set(spread(29, 30))) == 29


@pytest.mark.parametrize("layers", [0, 30, 31])
def test_as_many_layers_as_the_target_are_refused(layers: int) -> None:
    with pytest.raises(DistillError, match="give 1 to 29"):
        spread(layers, 30)


def test_an_early_exit_has_the_lowest_layers_and_an_adapter() -> None:
    assert early_exit(2, 3) == [0, 2]
    assert early_exit(4, 30) == [0, 1, 2, 29]


@pytest.mark.parametrize("layers", [0, 1, 30])
def test_an_early_exit_without_a_layer_of_the_target_is_refused(layers: int) -> None:
    with pytest.raises(DistillError, match="give 2 to 29"):
        early_exit(layers, 30)


def test_a_student_of_all_layers_is_the_target(target: Any) -> None:
    student = make_student(target, [0, 1, 2])
    torch.testing.assert_close(student(TOKENS).logits, target(TOKENS).logits, rtol=0, atol=0)
    # Control: the order of the layers is the one asked for.
    assert not torch.allclose(make_student(target, [2, 1, 0])(TOKENS).logits, target(TOKENS).logits)


def test_only_layers_and_norm_learn_and_nothing_is_shared(target: Any) -> None:
    student = make_student(target, [0, 2])
    learning = {name for name, p in student.named_parameters() if p.requires_grad}
    assert learning == {
        name for name, _ in student.named_parameters() if ".layers." in name or "model.norm" in name
    }
    assert "model.norm.weight" in learning
    theirs = {p.data_ptr() for p in target.parameters()}
    assert not theirs & {p.data_ptr() for p in student.parameters()}


def test_frozen_layers_do_not_learn(target: Any) -> None:
    student = make_student(target, [0, 2], frozen=1)
    learning = {name for name, p in student.named_parameters() if p.requires_grad}
    assert learning == {
        name
        for name, _ in student.named_parameters()
        if ".layers.1." in name or "model.norm" in name
    }
    student(TOKENS).logits.sum().backward()
    assert student.model.layers[0].mlp.up_proj.weight.grad is None
    assert student.model.layers[1].mlp.up_proj.weight.grad is not None


def test_the_saved_draft_loads_and_has_the_tokenizer(
    target: Any, target_folder: Path, tmp_path: Path
) -> None:
    student = make_student(target, [0, 2])
    save_student(student, target_folder, tmp_path, torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(target)
    assert loaded.config.num_hidden_layers == 2
    torch.testing.assert_close(loaded(TOKENS).logits, student(TOKENS).logits, rtol=0, atol=0)
    assert tokenizer_hash(tmp_path) == tokenizer_hash(target_folder)
    text = "the cat sat"
    ids = [AutoTokenizer.from_pretrained(f)(text)["input_ids"] for f in (tmp_path, target_folder)]
    assert ids[0] == ids[1]
    assert (tmp_path / "chat_template.jinja").is_file()


def test_the_stored_dtype(target: Any, target_folder: Path, tmp_path: Path) -> None:
    assert stored_dtype(target_folder) == torch.float32
    save_student(make_student(target, [0]), target_folder, tmp_path, torch.bfloat16)
    assert stored_dtype(tmp_path) == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("stored", "fast", "loaded"),
    [
        (torch.bfloat16, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float16, "bfloat16", torch.float32),
        (torch.float32, "bfloat16", torch.float32),
    ],
)
def test_a_cpu_takes_bfloat16_where_it_is_fast(
    target: Any,
    target_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: torch.dtype,
    fast: str,
    loaded: torch.dtype,
) -> None:
    save_student(make_student(target, [0]), target_folder, tmp_path, stored)
    monkeypatch.setattr("vllm_ext.distill.student.fast_dtype", lambda: fast)
    assert load_target(tmp_path, torch.device("cpu")).dtype == loaded


def tiny_gemma() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
        sliding_window=4,
    )
    return Gemma3ForCausalLM(config).eval()


def test_settings_per_layer_follow_their_layers_and_ties_stay() -> None:
    gemma = tiny_gemma()
    gemma.config.eos_token_id = [1, 2, 3, 4, 5, 6]
    check_target(gemma)
    student = make_student(gemma, [0, 5])
    assert student.config.eos_token_id == [1, 2, 3, 4, 5, 6]
    assert student.config.layer_types == ["sliding_attention", "full_attention"]
    assert student.lm_head.weight is student.model.embed_tokens.weight
    whole = make_student(gemma, range(6))
    torch.testing.assert_close(whole(TOKENS).logits, gemma(TOKENS).logits, rtol=0, atol=0)


def test_the_output_layer_of_some_tokens(target: Any) -> None:
    gemma = tiny_gemma()
    gemma.config.final_logit_softcapping = 2.0
    check_target(gemma)
    hidden = gemma.model(TOKENS).last_hidden_state
    some = torch.tensor([5, 3, 60])
    torch.testing.assert_close(head_logits(gemma, hidden, some), gemma(TOKENS).logits[..., some])
    assert gemma(TOKENS).logits.abs().max() < 2


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, GraniteConfig, GraniteForCausalLM

    other = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2))
    with pytest.raises(DistillError, match="GPT2LMHeadModel cannot be cut"):
        check_target(other)
    torch.manual_seed(0)
    scaled = GraniteForCausalLM(
        GraniteConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            logits_scaling=8.0,
            initializer_range=0.5,
        )
    )
    with pytest.raises(DistillError, match="changes its logits"):
        check_target(scaled)
    with pytest.raises(DistillError, match="cannot be loaded"):
        load_target(tmp_path, torch.device("cpu"))
