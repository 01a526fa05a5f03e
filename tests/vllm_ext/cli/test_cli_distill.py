# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.vllm_ext.engine import make_tiny_model
from vllm_ext.cli import app
from vllm_ext.cli.distill import default_layers, shown
from vllm_ext.distill import run as distill_run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["distill", *map(str, arguments)])


def mean(value: float | None) -> dict[str, float | None]:
    return {"mean": value, "low": value, "high": value}


def report() -> dict[str, Any]:
    found = {
        "greedy": {"top1_agreement": mean(0.5), "accepted_per_step": mean(None)},
        "t1": {name: mean(0.25) for name in ("one_minus_tv", "accepted_per_step", "matched", "kl")},
    }
    return {
        "before": found,
        "after": found,
        "settings": {"layers": 1},
        "draft_vocab": {
            "tokens": 64,
            "of": 259,
            "covered": {"greedy": mean(0.987), "t1": mean(None)},
        },
        "milliseconds_per_token": {
            "target": 50.0,
            "draft": 12.5,
            "draft_of_its_vocabulary": 7.5,
        },
        "parameters": {"target": 134e6, "draft": 42e6},
    }


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The jobs that would have been done."""
    found: list[Any] = []

    def distill(job: Any, say: Any) -> dict[str, Any]:
        found.append(job)
        return report()

    monkeypatch.setattr(distill_run, "distill", distill)
    return found


def test_the_options_reach_the_job(model: Path, tmp_path: Path, jobs: list[Any]) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")
    made = run(
        "--model", model, "--out", tmp_path / "o", "--input", tmp_path / "a.txt",
        "--input", tmp_path / "b.txt", "--minutes", 3, "--seed", 7, "--raw",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    (job,) = jobs
    assert job.target == model
    assert job.inputs == (tmp_path / "a.txt", tmp_path / "b.txt")
    assert (job.minutes, job.seed, job.raw, job.held_out) == (3.0, 7, True, None)
    assert not job.early_exit
    # Three layers: an eighth is one.
    assert job.layers == 1
    assert "draft of 1 layers" in made.output


def test_an_early_exit_reaches_the_job(model: Path, tmp_path: Path, jobs: list[Any]) -> None:
    made = run("--model", model, "--out", tmp_path / "o", "--early-exit", "--layers", 2)
    assert made.exit_code == 0, made.output
    assert [(job.early_exit, job.layers) for job in jobs] == [(True, 2)]


def test_the_table() -> None:
    text = "\n".join(shown(report()))
    assert "| greedy: same best token | 0.500 | 0.500 [0.500, 0.500] |" in text
    assert "answers too short" in text
    assert "64 of 259 tokens: 98.7% of the greedy answers and (answers too short) of" in text
    assert "draft 7.5 ms, with logits of all tokens 12.5 ms (42M parameters)" in text
    assert "target 50.0 ms (134M)" in text


def test_default_layers() -> None:
    assert [default_layers(total) for total in (2, 18, 30, 80)] == [1, 2, 4, 10]
    assert default_layers(2, early_exit=True) == 2
    assert default_layers(80, early_exit=True) == 10


def test_refusals_are_one_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "folder").mkdir()
    out = tmp_path / "out"
    for arguments, message in (
        (("--model", tmp_path / "no", "--out", out), "neither a folder nor"),
        (("--model", tmp_path / "folder", "--out", out), "is no model"),
        (("--model", model, "--out", out, "--layers", 3), "give 1 to 2"),
        (("--model", model, "--out", model), "holds other files"),
        (("--model", model, "--out", out, "--input", tmp_path / "empty.txt"), "is empty"),
    ):
        shown = run(*arguments)
        assert shown.exit_code == 1, shown.output
        assert message in shown.output
        assert shown.output.startswith("error: ")
        assert "Traceback" not in shown.output


def test_a_missing_input_is_a_usage_error(model: Path, tmp_path: Path) -> None:
    shown = run("--model", model, "--out", tmp_path / "o", "--input", tmp_path / "none.txt")
    assert shown.exit_code == 2


def test_an_interruption_says_how_to_go_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def distill(job: Any, say: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(distill_run, "distill", distill)
    shown = run("--model", model, "--out", tmp_path / "o")
    assert shown.exit_code == 130
    assert "the same command goes on" in shown.output
