# SPDX-License-Identifier: Apache-2.0
"""Where primed tables lie, and which one an engine uses (see `proposers.prime`).

``vllm-ext prime`` writes the table of a model into the user's cache under the model's hash; an
engine whose option ``prime`` is "auto" looks there. Priming is never worth a failed start: what
cannot be used is left out with one warning. A path that the user names is checked before the engine
starts.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from proposers.prime import PrimeError, PrimeTable
from vllm_ext.identity import (
    IdentityError,
    cache_folder,
    local_folder,
    model_hash,
    tokenizer_hash,
)

AUTO = "auto"
OFF = "off"

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
        option: "auto", "off" or a path.
        model_config: vLLM's `ModelConfig` of the target.
        download_dir: where vLLM keeps downloaded models, if not in the default place.
    """
    if option == OFF:
        return None
    try:
        return _load(option, model_config, download_dir)
    except (IdentityError, PrimeError, OSError) as error:
        if option != AUTO or not isinstance(error, IdentityError):
            logger.warning("vllm-ext: drafting starts unprimed: %s", error)
        return None


def check_path(option: str, model_config: Any, download_dir: str | None) -> None:
    """Refuse a table that the user named and that cannot be used.

    Raises:
        PrimeError: if it cannot be read, is no table, or belongs to another model.
        IdentityError: if the model is not on this machine, so that nothing can be compared.
    """
    if option not in (AUTO, OFF):
        _load(option, model_config, download_dir)


def _load(option: str, model_config: Any, download_dir: str | None) -> PrimeTable | None:
    folder = local_folder(model_config.model, model_config.revision, download_dir)
    identity = identity_of(folder)
    path = table_path(identity) if option == AUTO else Path(option).expanduser()
    if option == AUTO and not path.exists():
        return None
    table = PrimeTable.load(path, identity, model_config.get_vocab_size())
    logger.info("vllm-ext: drafting is primed with %d tokens from %s", len(table), path)
    return table
