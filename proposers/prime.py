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

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from proposers import stored

MAX_WIDTH = 64


class PrimeError(stored.StoredError):
    """A table cannot be used; the message says why and what to do."""


KIND = stored.Kind("vllm-ext-prime", "1", "prime table", "vllm-ext prime", 1 << 30, PrimeError)


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
            identity: what the table belongs to; `load` compares it.
        """
        from safetensors.numpy import save

        tensors = {"tokens": self.tokens, "ids": self.ids, "probs": self.probs}
        stored.write(path, save(tensors, metadata=KIND.metadata(identity)))

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
        from safetensors.numpy import load

        tensors = stored.load(path, KIND, identity, load)
        return cls(*_checked(path, tensors, vocab_size))


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
