# SPDX-License-Identifier: Apache-2.0
"""The file of the tokens that a draft model may draft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_ext.draft_vocab import FILE, DraftVocabError, load, path_of, save

TOKENS = list(range(3, 203, 2))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save(tmp_path / FILE, TOKENS[::-1])
    assert load(tmp_path / FILE, 202) == TOKENS
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "is no draft vocabulary"),
        ({"version": 2}, r"has version 2, this program reads 1"),
        ({"tokens": "3"}, "no list of ids"),
        ({"tokens": [*TOKENS, 300.0]}, "no list of ids"),
        ({"tokens": [*TOKENS, True]}, "no list of ids"),
        ({"tokens": TOKENS[:5]}, "lists 5 tokens; at least 64"),
        ({"tokens": [*TOKENS, 201]}, "not in ascending order"),
        ({"tokens": [-1, *TOKENS]}, "from -1 to 201.*another model"),
        ({"tokens": [*TOKENS, 202]}, "from 3 to 202.*has 202.*another model"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save(tmp_path / FILE, TOKENS)
    content = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps({**content, **changes}))
    with pytest.raises(DraftVocabError, match=message):
        load(tmp_path / FILE, 202)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[1]", b"null"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(DraftVocabError, match=FILE):
        load(tmp_path / FILE, 202)


def test_a_missing_and_a_huge_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DraftVocabError, match="cannot be read"):
        load(tmp_path / FILE, 202)
    with (tmp_path / FILE).open("wb") as file:
        file.truncate(1 << 26)
    with pytest.raises(DraftVocabError, match="larger than"):
        load(tmp_path / FILE, 202)


def test_where_it_is(tmp_path: Path) -> None:
    assert path_of(None, tmp_path) is None
    assert path_of("off", tmp_path) is None
    assert path_of("some/file.json", tmp_path) == Path("some/file.json")
    save(tmp_path / FILE, TOKENS)
    assert path_of(None, tmp_path) == tmp_path / FILE
    assert path_of("off", tmp_path) is None
