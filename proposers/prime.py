# SPDX-License-Identifier: Apache-2.0
"""A bigram table computed before serving: what the target says after each frequent token.

Token Recycling (arXiv 2408.08696) starts from an empty adjacency matrix, and its hot start needs
earlier traffic. Here the matrix is filled offline by the target itself: for a token t,

    p_0(. | t) = top_WIDTH of p_target(. | anchor, t)

where `anchor` is a token that may begin a text. t must not stand at position 0, where
attention has nothing else to look at and the answer is noise. Live observations override it.

The file is a safetensors file: no code in it, and its header says which model and tokenizer it
belongs to.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FORMAT = "vllm-ext-prime"
VERSION = "1"
MAX_WIDTH = 64
_MAX_HEADER = 1 << 16
_MAX_FILE = 1 << 30


class PrimeError(ValueError):
    """A table cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class PrimeTable:
    """Successors of T tokens.

    Attributes:
        tokens: int32 [T], distinct.
        ids: int32 [T, K], distinct within a row where the probability is positive.
        probs: float32 [T, K], by falling probability; 0 marks an empty place.
    """

    tokens: NDArray[np.int32]
    ids: NDArray[np.int32]
    probs: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.tokens)

    def save(self, path: Path, identity: Mapping[str, str]) -> None:
        """Write the file, whole or not at all.

        Args:
            path: of the file; its folder is made.
            identity: what the table belongs to, in plain strings; `load` compares it.
        """
        from safetensors.numpy import save

        payload = save(
            {"tokens": self.tokens, "ids": self.ids, "probs": self.probs},
            metadata={**identity, "format": FORMAT, "version": VERSION},
        )
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

    @classmethod
    def load(cls, path: Path, identity: Mapping[str, str], vocab_size: int) -> PrimeTable:
        """Read a file that `save` wrote.

        Args:
            path: of the file.
            identity: what the table must belong to.
            vocab_size: every token id must lie below it.

        Raises:
            PrimeError: if it cannot be read, is no such table, is damaged, or belongs to another
                model.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            metadata = read_metadata(path)
            if path.stat().st_size > _MAX_FILE:
                raise PrimeError(f"prime table {path}: larger than {_MAX_FILE} bytes")
            tensors = load(path.read_bytes())
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, PrimeError):
                raise
            raise PrimeError(f"prime table {path}: cannot be read ({error})") from error
        for name, wanted in identity.items():
            if metadata.get(name) != wanted:
                raise PrimeError(
                    f"prime table {path}: made for {name} {metadata.get(name)!r}, but this is "
                    f"{wanted!r}; run `vllm-ext prime` for this model"
                )
        return cls(*_checked(path, tensors, vocab_size))


def read_metadata(path: Path) -> dict[str, str]:
    """The header's own entries: format, version and identity.

    Raises:
        PrimeError: if the file is no such table.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= _MAX_HEADER:
            raise PrimeError(
                f"prime table {path}: its header claims {size} bytes, at most {_MAX_HEADER} are "
                "allowed: not a table of `vllm-ext prime`"
            )
        raw = file.read(size)
    try:
        metadata = json.loads(raw)["__metadata__"]
        known, version = metadata["format"] == FORMAT, metadata["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        known, version = False, None
    if not known:
        raise PrimeError(f"prime table {path}: not a table of `vllm-ext prime`")
    if version != VERSION:
        raise PrimeError(
            f"prime table {path}: version {version!r}, this program reads {VERSION!r}; make it "
            "again with `vllm-ext prime`"
        )
    return {str(key): str(value) for key, value in metadata.items()}


def _checked(
    path: Path, tensors: dict[str, NDArray[np.generic]], vocab_size: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """The three arrays, if they are what `PrimeTable` promises."""
    found = {name: (str(array.dtype), array.ndim) for name, array in tensors.items()}
    if found != {"tokens": ("int32", 1), "ids": ("int32", 2), "probs": ("float32", 2)}:
        raise PrimeError(f"prime table {path}: holds {found}, not tokens, ids and probs")
    tokens = tensors["tokens"].astype(np.int32)
    ids, probs = tensors["ids"].astype(np.int32), tensors["probs"].astype(np.float32)
    if ids.shape != probs.shape or len(ids) != len(tokens) or not 1 <= ids.shape[1] <= MAX_WIDTH:
        shapes = {name: array.shape for name, array in tensors.items()}
        raise PrimeError(f"prime table {path}: shapes {shapes} do not fit together")
    in_range = all(((a >= 0) & (a < vocab_size)).all() for a in (tokens, ids))
    proper = bool(np.isfinite(probs).all()) and bool((probs >= 0).all())
    if not (in_range and proper and (probs.sum(axis=1) <= 1.01).all()):
        raise PrimeError(f"prime table {path}: token ids or probabilities out of range")
    if len(np.unique(tokens)) != len(tokens):
        raise PrimeError(f"prime table {path}: a token occurs twice")
    return tokens, ids, probs
