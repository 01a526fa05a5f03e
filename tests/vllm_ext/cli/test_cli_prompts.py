# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest

from vllm_ext.cli.prompts import Prompt, PromptFileError, fitting, load_prompts


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_all_three_kinds_of_row(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "a", "task": "t", "category": "c"},
        {"messages": messages, "category": "c"},
        {"turns": ["first", "second"]},
    )
    assert load_prompts(path) == [
        Prompt("a", "t"),
        Prompt(messages, "c"),
        Prompt("first", "all"),
    ]


def test_blank_lines_are_skipped_and_limit_counts_rows(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('\n{"prompt": "a"}\n\n{"prompt": "b"}\n{"prompt": "c"}\n', encoding="utf-8")
    assert [p.content for p in load_prompts(path, limit=2)] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "must be an object"),
        ('{"text": "a"}', "it has ['text']"),
        ('{"turns": []}', "'turns'"),
        ('{"prompt": ""}', "'prompt'"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line, encoding="utf-8")
    with pytest.raises(PromptFileError) as caught:
        load_prompts(path)
    assert f"{path}:2" in str(caught.value)
    assert said in str(caught.value)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptFileError, match="no prompts"):
        load_prompts(write(tmp_path / "p.jsonl"))


def test_prompts_that_leave_no_room_are_left_out_and_keep_their_row_number() -> None:
    rows = [Prompt("long"), Prompt("short", "t")]
    kept = fitting(rows, [[1] * 9, [1] * 4], max_prompt_tokens=4)
    assert [(p.index, p.task, p.token_ids) for p in kept] == [(1, "t", [1] * 4)]
    with pytest.raises(PromptFileError, match="the shortest has 4"):
        fitting(rows, [[1] * 9, [1] * 4], max_prompt_tokens=3)
