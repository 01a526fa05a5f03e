# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from proposers.datastore import HEADER
from tests.vllm_ext.engine import make_tiny_model
from vllm_ext.cli import app

pytest.importorskip("pydivsufsort", reason="building needs vllm-ext[datastore]")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def built(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    (folder / "a.txt").write_text("the cat sat on the mat\n" * 3)
    (folder / "b.jsonl").write_text(json.dumps({"text": "the dog"}) + "\n")
    made = run("build", "--model", model, "--input", folder / "a.txt", "--out", folder / "out",
               folder / "b.jsonl")  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "78 tokens of 2 documents" in made.output
    return folder / "out"


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["datastore", *map(str, arguments)])


def test_info(built: Path) -> None:
    shown = run("info", built)
    assert shown.exit_code == 0
    assert "documents   2" in shown.output
    assert "tokens      78" in shown.output


def test_query(built: Path, model: Path) -> None:
    shown = run("query", built, "the ", "--model", model, "--tokens", "3")
    assert shown.exit_code == 0
    assert "7 occurrences of 4 tokens" in shown.output
    assert "'cat'" in shown.output
    assert "'dog'" in shown.output
    assert "0 occurrences" in run("query", built, "elephant", "--model", model).output


def test_building_twice_is_refused(built: Path, model: Path) -> None:
    again = run("build", "--model", model, "--input", built.parent / "a.txt", "--out", built)
    assert again.exit_code == 1
    assert "already holds a datastore" in again.output


def test_a_broken_store_is_one_line(built: Path, tmp_path: Path, model: Path) -> None:
    (tmp_path / HEADER).write_text("{}")
    for arguments in (("info", tmp_path), ("query", tmp_path, "x", "--model", model)):
        shown = run(*arguments)
        assert shown.exit_code == 1
        assert shown.output.startswith("error: datastore")
        assert "Traceback" not in shown.output


def test_a_model_that_is_not_here(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    shown = run("build", "--model", tmp_path / "no", "--input", tmp_path / "a.txt",
                "--out", tmp_path / "o")  # fmt: skip
    assert shown.exit_code == 1
    assert "neither a folder nor" in shown.output
