# SPDX-License-Identifier: Apache-2.0
"""Which model and which tokenizer is this? Short hashes of their content, quick for any size.

They key what is computed once per model: files with the same bytes have the same hash wherever
they lie and whenever they were written. Of large weight files the size and evenly spaced blocks are
hashed, the first among them, which holds the names and shapes of the tensors.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "tekken.json",
)
_BLOCK = 1 << 16
_BLOCKS = 64


class IdentityError(ValueError):
    """The model's files cannot be found or read; the message says what was looked for."""


def cache_folder() -> Path:
    """vllm-ext below $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-ext"


def local_folder(model: str, revision: str | None = None, cache: str | None = None) -> Path:
    """The folder of a model: itself, or its snapshot in the Hugging Face cache (no download).

    Args:
        model: a folder or a Hugging Face name.
        revision: of the name; the default branch if `None`.
        cache: the download folder if it is not the default one.

    Raises:
        IdentityError: if there is neither.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(model, revision=revision, cache_dir=cache, local_files_only=True)
        )
    except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise IdentityError(
            f"model {model!r}: neither a folder nor a model in the Hugging Face cache; load it "
            "once with vLLM, or give its folder"
        ) from error


def model_hash(folder: Path) -> str:
    """32 hex digits for the configuration and the weights in `folder`.

    Raises:
        IdentityError: if there are no weights, or a file cannot be read.
    """
    try:
        weights = sorted(f for f in folder.iterdir() if f.suffix in _WEIGHTS and f.is_file())
        if not weights:
            raise IdentityError(f"{folder}: holds no weights ({', '.join(_WEIGHTS)})")
        return _hashed([folder / "config.json", *weights])
    except OSError as error:
        raise IdentityError(f"{folder}: {error}") from error


def tokenizer_hash(folder: Path) -> str:
    """32 hex digits for the tokenizer files in `folder`.

    Raises:
        IdentityError: if there are none, or one cannot be read.
    """
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        raise IdentityError(f"{folder}: holds no tokenizer ({', '.join(TOKENIZER_FILES)})")
    try:
        return _hashed(files)
    except OSError as error:
        raise IdentityError(f"{folder}: {error}") from error


def _hashed(files: Iterable[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            if size <= _BLOCK * _BLOCKS:
                digest.update(file.read())
                continue
            for block in range(_BLOCKS):
                file.seek((size - _BLOCK) * block // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()
