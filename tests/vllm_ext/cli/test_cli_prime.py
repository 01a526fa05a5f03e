# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from proposers.prime import PrimeTable
from tests.vllm_ext.engine import VOCAB, make_tiny_model
from vllm_ext.cli import app, prime
from vllm_ext.model_files import identity_of
from vllm_ext.prime import TABLES


class FakeLLM:
    """Answers every prompt with the nine tokens after its last one."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []

    def generate(self, requests: list[dict[str, Any]], params: Any, use_tqdm: bool) -> list[Any]:
        self.prompts += [request["prompt_token_ids"] for request in requests]
        assert (params.max_tokens, params.temperature, params.logprobs) == (1, 0.0, 8)
        return [self._output(request["prompt_token_ids"][-1]) for request in requests]

    def _output(self, token: int) -> Any:
        said = {
            (token + k) % VOCAB: SimpleNamespace(logprob=float(np.log(0.2 / k)))
            for k in range(1, 10)
        }
        return SimpleNamespace(outputs=[SimpleNamespace(logprobs=[said])])


def test_no_token_stands_first_and_the_best_eight_are_kept() -> None:
    pytest.importorskip("vllm")
    llm = FakeLLM()
    table = prime.ask(llm, 7, range(5), lambda steps, doing: None)
    assert llm.prompts == [[7, t] for t in range(5)]
    assert table.tokens.tolist() == list(range(5))
    assert table.ids[2].tolist() == [3, 4, 5, 6, 7, 8, 9, 10]
    assert table.probs[2] == pytest.approx([0.2 / k for k in range(1, 9)])


def test_the_anchor_ends_or_begins_a_text() -> None:
    def anchor(names: dict[str, int], **special: str) -> int:
        tokenizer = SimpleNamespace(
            **{"eos_token": None, "bos_token": None, **special},
            unk_token_id=0,
            convert_tokens_to_ids=lambda name: names.get(name, 0),
        )
        return prime.default_anchor(tokenizer)

    names = {"<|endoftext|>": 5, "</s>": 6, "<s>": 7}
    assert anchor(names, eos_token="</s>") == 5
    assert anchor({"</s>": 6}, eos_token="</s>", bos_token="<s>") == 6
    assert anchor({"<s>": 7}, bos_token="<s>") == 7
    assert anchor({}) == 0


def test_the_table_is_that_of_the_model(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    def compute(model: str, *, tokens: int, anchor: int | None, dtype: str) -> PrimeTable:
        asked.append((model, tokens))
        return PrimeTable(
            np.arange(2, dtype=np.int32),
            np.ones((2, 8), np.int32),
            np.full((2, 8), 0.1, np.float32),
        )

    monkeypatch.setattr(prime, "compute", compute)
    command = ["prime", "--model", str(model_folder), "--tokens", "2"]
    assert CliRunner().invoke(app, command).exit_code == 0
    identity = identity_of(model_folder)
    assert len(PrimeTable.load(TABLES.path(identity), identity, VOCAB)) == 2
    assert asked == [(str(model_folder), 2)]


@pytest.mark.engine
def test_a_real_model_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table holds what the model itself says after the anchor and the token."""
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    model = make_tiny_model(tmp_path / "model")
    table = prime.compute(str(model), tokens=40, anchor=None, dtype="float32")
    assert table.tokens.tolist() == list(range(40))
    with torch.inference_mode():
        prompts = torch.tensor([[1, token] for token in range(40)])  # </s>, then the token
        logits = AutoModelForCausalLM.from_pretrained(model)(prompts).logits[:, -1]
        top = logits.softmax(-1).topk(8)
    assert table.probs == pytest.approx(top.values.numpy(), abs=1e-3)
    assert (table.ids[:, 0] == top.indices[:, 0].numpy()).all()
