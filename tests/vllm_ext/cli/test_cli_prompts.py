# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest

from vllm_ext.cli.prompts import (
    Prompt,
    PromptFileError,
    dataset_names,
    evenly,
    fitting,
    load_datasets,
    load_prompts,
)


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
    rows = [Prompt("long"), Prompt("short", "t", "d")]
    kept = fitting(rows, [[1] * 9, [1] * 4], max_prompt_tokens=4)
    assert [(p.index, p.task, p.token_ids, p.dataset) for p in kept] == [(1, "t", [1] * 4, "d")]
    with pytest.raises(PromptFileError, match="the shortest has 4"):
        fitting(rows, [[1] * 9, [1] * 4], max_prompt_tokens=3)


def test_several_files_are_read_in_order_and_name_their_rows(tmp_path: Path) -> None:
    named = write(tmp_path / "a.jsonl", {"prompt": "1", "task": "x"}, {"prompt": "2"})
    unnamed = write(tmp_path / "b.jsonl", {"turns": ["3"]})
    assert load_datasets([named, unnamed]) == [
        Prompt("1", "a/x", "a"),
        Prompt("2", "a", "a"),
        Prompt("3", "b", "b"),
    ]
    assert load_datasets([named]) == [Prompt("1", "x", "a"), Prompt("2", "a", "a")]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/qa.jsonl", "a/code.jsonl"], ["qa", "code"]),
        (["qa/dev.jsonl", "code/dev.jsonl"], ["qa", "code"]),
        (["qa/dev.jsonl", "qa/test.jsonl"], ["qa/dev", "qa/test"]),
        (["/a/qa/dev.jsonl", "/b/qa/dev.jsonl"], ["/a/qa/dev.jsonl", "/b/qa/dev.jsonl"]),
    ],
)
def test_data_sets_are_named_after_what_tells_the_files_apart(
    paths: list[str], names: list[str]
) -> None:
    assert dataset_names([Path(path) for path in paths]) == names


def test_a_file_given_twice_is_refused() -> None:
    with pytest.raises(PromptFileError, match="twice"):
        dataset_names([Path("a.jsonl"), Path("x/../a.jsonl")])


def test_a_sample_is_even_per_file(tmp_path: Path) -> None:
    long = write(tmp_path / "long.jsonl", *({"prompt": f"l{i}"} for i in range(10)))
    short = write(tmp_path / "short.jsonl", *({"prompt": f"s{i}"} for i in range(2)))
    chosen = [p.content for p in load_datasets([long, short], sample=4)]
    assert chosen == ["l0", "l2", "l5", "l7", "s0", "s1"]
    assert [p.content for p in load_datasets([long, short], limit=1)] == ["l0", "s0"]


@pytest.mark.parametrize("count", [1, 3, 7, 20])
def test_even_spacing_never_differs_by_more_than_one(count: int) -> None:
    rows = [Prompt(str(i)) for i in range(20)]
    chosen = [int(str(p.content)) for p in evenly(rows, count)]
    gaps = [b - a for a, b in zip(chosen, [*chosen[1:], 20], strict=True)]
    assert len(chosen) == count
    assert max(gaps) - min(gaps) <= 1
