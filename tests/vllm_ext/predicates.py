# SPDX-License-Identifier: Apache-2.0
"""Predicates that the engine tests install, and how."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

GROUP = "vllm_ext.predicates"


class Even:
    """An even number of up to four digits, or of the digits given as the argument."""

    def __init__(self, digits: str) -> None:
        self._digits = digits or "0123456789"

    def prefix(self, text: str) -> bool:
        return len(text) <= 4 and all(c in self._digits for c in text)

    def complete(self, text: str) -> bool:
        return bool(text) and int(text) % 2 == 0


class Failing:
    """Raises once the text has three characters."""

    def __init__(self, argument: str) -> None:
        del argument

    def prefix(self, text: str) -> bool:
        if len(text) > 3:
            raise RuntimeError("the database is gone")
        return True

    def complete(self, text: str) -> bool:
        return False


def install(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Offer them as an installed distribution would, here and in processes started from here."""
    info = folder / "vllm_ext_test_predicates-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-ext-test-predicates\n")
    (info / "entry_points.txt").write_text(
        f"[{GROUP}]\neven = {__name__}:Even\nfailing = {__name__}:Failing\n"
    )
    patch.syspath_prepend(str(folder))
    repository = str(Path(__file__).parents[2])  # where a server finds this module
    path = [str(folder), repository, os.environ.get("PYTHONPATH", "")]
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
