# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from proposers.hydra import HydraHead
from tests.vllm_ext.engine import VOCAB, make_tiny_model
from vllm_ext.cli import app
from vllm_ext.head import head_path
from vllm_ext.prime import identity_of

REPORT = {
    "agreement": {"greedy": [{"places": 7, "first": 0.5, "three": 0.75, "own": 1.0}]},
    "seconds": {"writing": 1.0, "reading": 2.0, "training": 3.0},
    "parameters": 3_000_000,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("vllm")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = tmp_path / "model"
    made.mkdir()
    (made / "model.safetensors").write_bytes(b"weights")
    (made / "tokenizer.json").write_text("{}")
    return made


def test_the_head_goes_to_the_cache_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def make_head(*given: Any) -> dict[str, Any]:
        calls.append(given)
        given[1].parent.mkdir(parents=True, exist_ok=True)
        given[1].write_bytes(b"")
        return REPORT

    monkeypatch.setattr("vllm_ext.heads.run.make_head", make_head)
    command = ["head", "--model", str(folder), "--minutes", "2", "--tokens", "99", "--width", "7"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "| greedy | 1 | 7 | 0.500 | 0.750 | 1.000 |" in shown.output
    assert "3.0M parameters in 6 s" in shown.output
    (target, path, inputs, minutes, settings, *_) = calls[0]
    assert (target, path) == (folder, head_path(identity_of(folder)))
    assert (inputs, minutes, settings.tokens, settings.inner) == ((), 2.0, 99, 7)
    assert "exists; --force" in CliRunner().invoke(app, command).output
    assert len(calls) == 1
    assert CliRunner().invoke(app, [*command, "--force"]).exit_code == 0
    assert len(calls) == 2


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    shown = CliRunner().invoke(app, ["head", "--model", str(folder)])
    assert shown.exit_code == 1
    assert "holds no weights" in shown.output


@pytest.mark.engine
def test_a_real_model_gets_a_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command on the tiny model, which repeats itself: its head knows what comes next."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm_ext.heads.run import HeadPlan, make_head
    from vllm_ext.heads.training import HeadSettings

    model = make_tiny_model(tmp_path / "model")
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i} times"}) + "\n" for i in range(300))
    )
    path = tmp_path / "head.safetensors"
    said: list[str] = []
    report = make_head(
        model,
        path,
        [tmp_path / "in.jsonl"],
        0.5,
        HeadSettings(tokens=100, inner=32, rows=256, rate=5e-3),
        "float32",
        said.append,
        HeadPlan(answer=24, context=96),
    )
    assert json.loads(path.with_suffix(".json").read_text()) == json.loads(json.dumps(report))
    head = HydraHead.load(path, identity_of(model), VOCAB, 64)
    assert len(head.tokens) == 100
    greedy = report["agreement"]["greedy"]
    assert greedy[0]["three"] > 0.05  # a random model is hard to learn; chance is 3 of 100
    assert report["data"]["held_out"] > 50
    assert said
    assert said[0].startswith("training: ")
