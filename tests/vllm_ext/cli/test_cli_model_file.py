# SPDX-License-Identifier: Apache-2.0
"""Commands that compute a file for a model: where it goes, and what is refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_ext.cli import app, prime
from vllm_ext.cli.model_file import cached_files
from vllm_ext.head import HEADS
from vllm_ext.model_files import ModelFiles, identity_of
from vllm_ext.prime import TABLES

pytest.importorskip("vllm")

Computed = list[Path]


class Made:
    """Stands for a primed table."""

    def __init__(self, computed: Computed) -> None:
        self._computed = computed

    def __len__(self) -> int:
        return 1

    def save(self, path: Path, identity: dict[str, str]) -> None:
        keep(self._computed, path)


def keep(computed: Computed, path: Path) -> None:
    computed.append(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Computed:
    """The files that were made, in order."""
    found: Computed = []

    def make_head(folder: Path, path: Path, *others: Any) -> dict[str, Any]:
        keep(found, path)
        return {"agreement": {}, "seconds": {}, "parameters": 0}

    monkeypatch.setattr(prime, "compute", lambda *given, **named: Made(found))
    monkeypatch.setattr("vllm_ext.heads.run.make_head", make_head)
    return found


@pytest.fixture(params=[("prime", TABLES), ("head", HEADS)], ids=lambda pair: pair[0])
def sort(request: pytest.FixtureRequest) -> tuple[str, ModelFiles[Any]]:
    return request.param


def test_the_file_goes_to_the_cache_once(
    model_folder: Path, computed: Computed, sort: tuple[str, ModelFiles[Any]]
) -> None:
    name, files = sort
    command = [name, "--model", str(model_folder)]
    path = files.path(identity_of(model_folder))
    assert CliRunner().invoke(app, command).exit_code == 0
    assert computed == [path]
    again = CliRunner().invoke(app, command)
    assert (again.exit_code, again.output) == (0, f"{path} exists; --force makes it again\n")
    assert computed == [path]
    assert CliRunner().invoke(app, [*command, "--force"]).exit_code == 0
    assert computed == [path, path]


def test_a_measurement_tells_what_the_cache_had(
    model_folder: Path, computed: Computed, sort: tuple[str, ModelFiles[Any]]
) -> None:
    model = str(model_folder)
    assert cached_files(model) == {}
    assert cached_files(f"{model}/nowhere") == {}
    assert CliRunner().invoke(app, [sort[0], "--model", model]).exit_code == 0
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert cached_files(model) == {sort[0]: empty}
    computed[0].write_bytes(b"another")
    assert cached_files(model) != {sort[0]: empty}


def test_a_user_names_another_file(
    model_folder: Path, computed: Computed, sort: tuple[str, ModelFiles[Any]], tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    shown = CliRunner().invoke(app, [sort[0], "--model", str(model_folder), "--out", str(out)])
    assert shown.exit_code == 0
    assert computed == [out]


def test_nothing_is_computed_for_what_cannot_be_written_or_used(
    model_folder: Path, computed: Computed, sort: tuple[str, ModelFiles[Any]], tmp_path: Path
) -> None:
    command = [sort[0], "--model", str(model_folder), "--force", "--out"]
    shown = CliRunner().invoke(app, [*command, str(tmp_path)])
    assert shown.exit_code == 1
    assert "is a folder: give a file" in shown.output
    for missing, said in (("tokenizer.json", "tokenizer"), ("model.safetensors", "no weights")):
        (model_folder / missing).unlink()
        shown = CliRunner().invoke(app, [*command, str(tmp_path / "mine")])
        assert shown.exit_code == 1
        assert said in shown.output
    assert computed == []
