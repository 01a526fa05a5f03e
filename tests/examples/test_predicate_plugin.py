# SPDX-License-Identifier: Apache-2.0
"""The example of a predicate: it does what it says, and the documentation shows it whole."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest

from logits_processors import predicate as module
from logits_processors.constraint import ConstraintError
from logits_processors.predicate import ENTRY_POINT_GROUP, compile_predicate
from logits_processors.vocabulary import Vocabulary

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "examples" / "predicate_plugin"
BYTES = Vocabulary((*(bytes([i]) for i in range(256)), b""), eos_ids=(256,))


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the package's entry point names, where the engine looks for entry points."""
    monkeypatch.syspath_prepend(str(PLUGIN))
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    [(name, target)] = project["entry-points"][ENTRY_POINT_GROUP].items()
    entries = EntryPoints((EntryPoint(name, target, ENTRY_POINT_GROUP),))
    monkeypatch.setattr(module, "entry_points", lambda group: entries.select(group=group))
    return entries[name].load()


def texts(length: int) -> list[str]:
    return ["".join(t) for n in range(length + 1) for t in itertools.product("0123, ", repeat=n)]


def wrong(prefix: Callable[[str], bool], complete: Callable[[str], bool]) -> list[str]:
    """Texts of up to 3 characters whose verdict disagrees with all texts of up to 7."""
    valid = [text for text in texts(7) if complete(text)]
    begun = {text[:i] for text in valid for i in range(len(text) + 1)}
    return [text for text in texts(3) if prefix(text) != (text in begun)]


def test_the_checks_agree_on_all_short_texts(factory: Any) -> None:
    sums = factory("3")
    valid = {text for text in texts(7) if sums.complete(text)}
    assert valid == {"3", "1, 2", "2, 1", "1, 1, 1"}
    assert wrong(sums.prefix, sums.complete) == []
    # The control: a prefix check that looks at the numbers alone, and not at what may follow.
    assert "3," in wrong(lambda text: sums._sum(text) <= 3, sums.complete)


@pytest.mark.usefixtures("factory")
def test_requests_find_it_by_name() -> None:
    compiled = compile_predicate("sums_to", BYTES, "12")
    constraint = compiled.start()
    assert all(constraint.accept(byte) for byte in b"5, 7")
    assert constraint.complete()
    assert not constraint.accept(ord("0"))
    for argument in ("", "many", "0"):
        with pytest.raises(ConstraintError, match="a number from 1 to 999999999 is needed"):
            compile_predicate("sums_to", BYTES, argument)


def test_the_documentation_shows_all_of_it() -> None:
    page = (ROOT / "docs" / "constraints.md").read_text(encoding="utf-8")
    for name in ("pyproject.toml", "sums_to.py"):
        text = (PLUGIN / name).read_text(encoding="utf-8").strip()
        assert f"\n{text}\n```" in page, f"copy {name} into docs/constraints.md"
