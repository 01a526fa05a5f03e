# SPDX-License-Identifier: Apache-2.0
"""Where draft heads lie, and which one an engine uses (see `proposers.hydra`).

``vllm-ext head`` writes the head of a model into the user's cache under the model's hash; an engine
whose option ``head`` is "auto" looks there. A head is never worth a failed start: one that cannot
be used is left out with one warning. A path that the user names is checked before the engine
starts.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from proposers.hydra import HydraError, HydraHead
from vllm_ext.identity import IdentityError, cache_folder, local_folder
from vllm_ext.prime import identity_of

AUTO = "auto"
OFF = "off"

logger = logging.getLogger("vllm.vllm_ext")


def head_path(identity: dict[str, str]) -> Path:
    """Where the head of a model lies in the user's cache."""
    return cache_folder() / "head" / f"{identity['model']}.safetensors"


def load_for_engine(option: str, model_config: Any, download_dir: str | None) -> HydraHead | None:
    """The head that an engine drafts with, or `None`; warns instead of failing.

    Args:
        option: "auto", "off" or a path.
        model_config: vLLM's `ModelConfig` of the target.
        download_dir: where vLLM keeps downloaded models, if not in the default place.
    """
    if option == OFF:
        return None
    try:
        return _load(option, model_config, download_dir)
    except (IdentityError, HydraError, OSError) as error:
        if option != AUTO or not isinstance(error, IdentityError):
            logger.warning("vllm-ext: drafting goes on without a head: %s", error)
        return None


def check_path(option: str, model_config: Any, download_dir: str | None) -> None:
    """Refuse a head that the user named and that cannot be used.

    Raises:
        HydraError: if it cannot be read, is no head, or belongs to another model.
        IdentityError: if the model is not on this machine, so that nothing can be compared.
    """
    if option not in (AUTO, OFF):
        _load(option, model_config, download_dir)


def _load(option: str, model_config: Any, download_dir: str | None) -> HydraHead | None:
    folder = local_folder(model_config.model, model_config.revision, download_dir)
    identity = identity_of(folder)
    path = head_path(identity) if option == AUTO else Path(option).expanduser()
    if option == AUTO and not path.exists():
        return None
    hidden = model_config.get_hidden_size()
    head = HydraHead.load(path, identity, model_config.get_vocab_size(), hidden)
    logger.info("vllm-ext: drafting with a head of %d tokens from %s", len(head.tokens), path)
    return head
