# SPDX-License-Identifier: Apache-2.0
"""The files of a model: where a command puts one, and which ones a measurement found."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from vllm_ext.cli import engines


@dataclass(frozen=True, slots=True)
class Destination:
    """A model and a file to write.

    Attributes:
        folder: of the model, on this machine.
        identity: what the file will belong to.
        path: of the file.
    """

    folder: Path
    identity: dict[str, str]
    path: Path


def destination(model: str, files: Any, out: Path | None, *, force: bool) -> Destination:
    """The file to write, or an exit before anything is computed: 0 if it exists, 1 on an error.

    Args:
        model: a folder, or a Hugging Face name, which is fetched.
        files: the sort of file (`ModelFiles`).
        out: as the user named it; else it goes to the cache.
        force: replace a file that exists.
    """
    from vllm_ext.identity import IdentityError, local_folder
    from vllm_ext.model_files import identity_of

    try:
        folder = local_folder(_downloaded(engines.model_argument(model)))
        identity = identity_of(folder)
    except IdentityError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    path: Path = out or files.path(identity)
    if path.is_dir():
        typer.echo(f"error: --out {path} is a folder: give a file", err=True)
        raise typer.Exit(1)
    if path.exists() and not force:
        typer.echo(f"{path} exists; --force makes it again")
        raise typer.Exit(0)
    return Destination(folder, identity, path)


def cached_files(model: str) -> dict[str, str]:
    """SHA-256 of what an option left at "auto" finds in the cache for a model, by sort.

    Args:
        model: a folder, or a Hugging Face name; one that is not on this machine has no files.
    """
    from vllm_ext.head import HEADS
    from vllm_ext.identity import IdentityError, local_folder
    from vllm_ext.model_files import identity_of
    from vllm_ext.prime import TABLES

    try:
        identity = identity_of(local_folder(model))
    except IdentityError:
        return {}
    paths = {files.folder: files.path(identity) for files in (TABLES, HEADS)}
    return {sort: _sha256(path) for sort, path in paths.items() if path.is_file()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _downloaded(model: str) -> str:
    """`model`, fetched if it is a Hugging Face name that is not on this machine yet."""
    if not Path(model).is_dir():
        from huggingface_hub import snapshot_download

        return snapshot_download(model)
    return model
