# SPDX-License-Identifier: Apache-2.0
"""Files that are computed once for a model: where they lie, and which one an engine uses.

A command writes such a file (`proposers.stored`) into the user's cache under the model's hash; an
engine whose option is "auto" looks there. Nothing of it is worth a failed start: what cannot be
used is left out with one warning. A path that the user names is checked before the engine starts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from proposers.stored import StoredError
from vllm_ext.identity import (
    IdentityError,
    cache_folder,
    local_folder,
    model_hash,
    tokenizer_hash,
)

AUTO = "auto"
OFF = "off"

T = TypeVar("T")
logger = logging.getLogger("vllm.vllm_ext")


def identity_of(folder: Path) -> dict[str, str]:
    """What a file for the model in `folder` says that it belongs to.

    Raises:
        IdentityError: if the folder has no weights or no tokenizer.
    """
    return {"model": model_hash(folder), "tokenizer": tokenizer_hash(folder)}


@dataclass(frozen=True, slots=True)
class ModelFiles(Generic[T]):
    """All files of one sort.

    Attributes:
        folder: in the user's cache.
        load: from a path, the identity that the file must have, and vLLM's `ModelConfig`.
        used: what the log says of one that an engine uses.
        without: what it says where one cannot be used.
        cached: values of the option that stand for the file in the cache.
    """

    folder: str
    load: Callable[[Path, dict[str, str], Any], T]
    used: Callable[[T], str]
    without: str
    cached: tuple[str, ...] = (AUTO,)

    def path(self, identity: dict[str, str]) -> Path:
        """Where the file of a model lies in the user's cache."""
        return cache_folder() / self.folder / f"{identity['model']}.safetensors"

    def for_engine(self, option: str, model_config: Any, download_dir: str | None) -> T | None:
        """What an engine uses, or `None`; warns instead of failing.

        Args:
            option: one of `cached`, "off" or a path.
            model_config: vLLM's `ModelConfig` of the target.
            download_dir: where vLLM keeps downloaded models, if not in the default place.
        """
        if option == OFF:
            return None
        try:
            return self._find(option, model_config, download_dir)
        except (IdentityError, StoredError, OSError) as error:
            if option not in self.cached or not isinstance(error, IdentityError):
                logger.warning("vllm-ext: %s: %s", self.without, error)
            return None

    def check(self, option: str, model_config: Any, download_dir: str | None) -> None:
        """Refuse a file that the user named and that cannot be used.

        Raises:
            StoredError: if it cannot be read, is of another sort, or belongs to another model.
            IdentityError: if the model is not on this machine, so that nothing can be compared.
        """
        if option not in (*self.cached, OFF):
            self._find(option, model_config, download_dir)

    def _find(self, option: str, model_config: Any, download_dir: str | None) -> T | None:
        folder = local_folder(model_config.model, model_config.revision, download_dir)
        identity = identity_of(folder)
        cached = option in self.cached
        path = self.path(identity) if cached else Path(option).expanduser()
        if cached and not path.exists():
            return None
        found = self.load(path, identity, model_config)
        logger.info("vllm-ext: %s from %s", self.used(found), path)
        return found
