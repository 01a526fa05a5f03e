# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from proposers.hydra import HydraHead
from tests.vllm_ext.engine import VOCAB, make_tiny_model
from vllm_ext.cli import app
from vllm_ext.model_files import identity_of

REPORT = {
    "agreement": {"greedy": [{"places": 7, "first": 0.5, "three": 0.75, "own": 1.0}]},
    "seconds": {"writing": 1.0, "reading": 2.0, "training": 3.0},
    "parameters": 3_000_000,
}


def test_options_reach_the_training_and_the_report_is_shown(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    calls: list[tuple[Any, ...]] = []

    def make_head(*given: Any) -> dict[str, Any]:
        calls.append(given)
        return REPORT

    monkeypatch.setattr("vllm_ext.heads.run.make_head", make_head)
    command = ["head", "--model", str(model_folder), "--minutes", "2", "--tokens", "99"]
    shown = CliRunner().invoke(app, [*command, "--width", "7"])
    assert shown.exit_code == 0, shown.output
    assert "| greedy | 1 | 7 | 0.500 | 0.750 | 1.000 |" in shown.output
    assert "3.0M parameters in 6 s" in shown.output
    ((target, _, identity, inputs, minutes, settings, *_),) = calls
    assert (target, identity) == (model_folder, identity_of(model_folder))
    assert (inputs, minutes, settings.tokens, settings.inner) == ((), 2.0, 99, 7)


@pytest.mark.engine
def test_a_real_model_gets_a_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The whole command on the tiny model, which repeats itself: its head knows what comes next."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    # Beside other tests, threads that share tiny products wait for each other most of the time.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    from vllm_ext.heads.run import HeadPlan, make_head
    from vllm_ext.heads.training import HeadSettings

    model = make_tiny_model(tmp_path / "model")
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i} times"}) + "\n" for i in range(300))
    )
    path = tmp_path / "head.json"  # the report must not take its place
    said: list[str] = []
    report = make_head(
        model,
        path,
        identity_of(model),
        [tmp_path / "in.jsonl"],
        0.5,
        HeadSettings(tokens=100, inner=32, rows=256, rate=5e-3),
        "float32",
        said.append,
        HeadPlan(answer=24, context=96),
    )
    assert json.loads(Path(f"{path}.json").read_text()) == json.loads(json.dumps(report))
    head = HydraHead.load(path, identity_of(model), VOCAB, 64)
    assert len(head.tokens) == 100
    greedy = report["agreement"]["greedy"]
    assert greedy[0]["three"] > 0.05  # a random model is hard to learn; chance is 3 of 100
    assert report["data"]["held_out"] > 50
    assert said
    assert said[0].startswith("training: ")
