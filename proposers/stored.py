# SPDX-License-Identifier: Apache-2.0
"""Files that a command computes once for a model: safetensors whose header says what they are.

No code is in them. The header names the format, its version, and the model and tokenizer that the
file belongs to; whatever does not fit is refused before the tensors are read.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

_MAX_HEADER = 1 << 16

T = TypeVar("T")


class StoredError(ValueError):
    """A file cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One sort of file.

    Attributes:
        format: what its header calls it.
        version: that this program writes and reads.
        noun: what messages call it.
        command: that makes it.
        most: bytes of the largest file that is read.
        error: raised where one cannot be used.
    """

    format: str
    version: str
    noun: str
    command: str
    most: int
    error: type[StoredError]

    def metadata(self, identity: Mapping[str, str]) -> dict[str, str]:
        """A header's own entries.

        Args:
            identity: what the file belongs to, in plain strings; `load` compares it.
        """
        return {**identity, "format": self.format, "version": self.version}


def write(path: Path, payload: bytes) -> None:
    """Write a file, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=".making-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
        os.chmod(scratch, 0o644)  # mkstemp's 0600 would hide a shared cache from others
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise


def load(
    path: Path, kind: Kind, identity: Mapping[str, str], parse: Callable[[bytes], dict[str, T]]
) -> dict[str, T]:
    """The tensors of a file, once its header fits.

    Args:
        path: of the file.
        kind: what it must be.
        identity: what it must belong to.
        parse: safetensors' `load` for the wanted sort of tensor.

    Raises:
        StoredError: the kind's own, if it cannot be read, is no such file, too large, damaged, or
            another model's.
    """
    from safetensors import SafetensorError

    try:
        return parse(_read(path, kind, identity))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, kind.error):
            raise
        raise kind.error(f"{kind.noun} {path}: cannot be read ({error})") from error


def _read(path: Path, kind: Kind, identity: Mapping[str, str]) -> bytes:
    metadata = read_metadata(path, kind)
    if path.stat().st_size > kind.most:
        raise kind.error(f"{kind.noun} {path}: larger than {kind.most} bytes")
    for name, wanted in identity.items():
        if metadata.get(name) != wanted:
            raise kind.error(
                f"{kind.noun} {path}: made for {name} {metadata.get(name)!r}, but this is "
                f"{wanted!r}; run `{kind.command}` for this model"
            )
    return path.read_bytes()


def read_metadata(path: Path, kind: Kind) -> dict[str, str]:
    """The header's own entries: format, version and identity.

    Raises:
        StoredError: the kind's own, if the file is no such file.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= _MAX_HEADER:
            raise kind.error(
                f"{kind.noun} {path}: its header claims {size} bytes, at most {_MAX_HEADER} are "
                f"allowed: not a file of `{kind.command}`"
            )
        raw = file.read(size)
    try:
        metadata = json.loads(raw)["__metadata__"]
        known, version = metadata["format"] == kind.format, metadata["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        known, version = False, None
    if not known:
        raise kind.error(f"{kind.noun} {path}: not a file of `{kind.command}`")
    if version != kind.version:
        raise kind.error(
            f"{kind.noun} {path}: version {version!r}, this program reads {kind.version!r}; make "
            f"it again with `{kind.command}`"
        )
    return {str(key): str(value) for key, value in metadata.items()}
