# SPDX-License-Identifier: Apache-2.0
"""Where primed tables lie, and which one an engine uses (see `proposers.prime`).

``vllm-ext prime`` writes the table of a model into the user's cache under the model's hash; an
engine whose option ``prime`` is "auto" looks there, and so does one that is to make it in the
background (`vllm_ext.background`). Priming is never worth a failed start: what
cannot be used is left out with one warning. A path that the user names is checked before the engine
starts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from proposers.prime import PrimeError, PrimeTable
from vllm_ext.identity import (
    IdentityError,
    cache_folder,
    local_folder,
    model_hash,
    tokenizer_hash,
)

AUTO = "auto"
BACKGROUND = "background"
OFF = "off"

WIDTH = 8
"""Successors kept of each token."""

DEFAULT_TOKENS = 12288
"""Tokens asked about: those with the lowest ids, the most frequent."""

_CACHED = (AUTO, BACKGROUND)

logger = logging.getLogger("vllm.vllm_ext")


def identity_of(folder: Path) -> dict[str, str]:
    """What a table of the model in `folder` says that it belongs to.

    Raises:
        IdentityError: if the folder has no weights or no tokenizer.
    """
    return {"model": model_hash(folder), "tokenizer": tokenizer_hash(folder)}


def table_path(identity: dict[str, str]) -> Path:
    """Where the table of a model lies in the user's cache."""
    return cache_folder() / "prime" / f"{identity['model']}.safetensors"


def load_for_engine(option: str, model_config: Any, download_dir: str | None) -> PrimeTable | None:
    """The table that an engine drafts from at first, or `None`; warns instead of failing.

    Args:
        option: "auto", "background", "off" or a path.
        model_config: vLLM's `ModelConfig` of the target.
        download_dir: where vLLM keeps downloaded models, if not in the default place.
    """
    if option == OFF:
        return None
    try:
        return _load(option, model_config, download_dir)
    except (IdentityError, PrimeError, OSError) as error:
        if option not in _CACHED or not isinstance(error, IdentityError):
            logger.warning("vllm-ext: drafting starts unprimed: %s", error)
        return None


def check_path(option: str, model_config: Any, download_dir: str | None) -> None:
    """Refuse a table that the user named and that cannot be used.

    Raises:
        PrimeError: if it cannot be read, is no table, or belongs to another model.
        IdentityError: if the model is not on this machine, so that nothing can be compared.
    """
    if option not in (*_CACHED, OFF):
        _load(option, model_config, download_dir)


def default_anchor(tokenizer: Any) -> int:
    """A token that may stand before any text: the end of another one, else its own beginning."""
    for name in ("<|endoftext|>", tokenizer.eos_token, tokenizer.bos_token):
        if name is not None:
            found = tokenizer.convert_tokens_to_ids(name)
            if isinstance(found, int) and found != tokenizer.unk_token_id:
                return found
    return 0


def table_of(tokens: Sequence[int], answers: Sequence[Mapping[int, Any]]) -> PrimeTable:
    """The table that vLLM's answers make.

    Args:
        tokens: asked about.
        answers: for each of them, vLLM's ``Logprob`` of the tokens that may follow.
    """
    ids = np.zeros((len(tokens), WIDTH), np.int32)
    probs = np.zeros((len(tokens), WIDTH), np.float32)
    for row, found in enumerate(answers):
        best = sorted(found.items(), key=lambda item: -item[1].logprob)[:WIDTH]
        ids[row, : len(best)] = [token for token, _ in best]
        probs[row, : len(best)] = [np.exp(said.logprob) for _, said in best]
    # Rounding of the target's own arithmetic may carry a sum above 1.
    probs /= np.maximum(probs.sum(axis=1, keepdims=True), 1.0)
    return PrimeTable(np.array(tokens, np.int32), ids, probs)


def _load(option: str, model_config: Any, download_dir: str | None) -> PrimeTable | None:
    folder = local_folder(model_config.model, model_config.revision, download_dir)
    identity = identity_of(folder)
    cached = option in _CACHED
    path = table_path(identity) if cached else Path(option).expanduser()
    if cached and not path.exists():
        return None
    table = PrimeTable.load(path, identity, model_config.get_vocab_size())
    logger.info("vllm-ext: drafting is primed with %d tokens from %s", len(table), path)
    return table
