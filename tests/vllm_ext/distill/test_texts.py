# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from vllm_ext.distill.errors import DistillError
from vllm_ext.distill.seeds import PROMPTS
from vllm_ext.distill.texts import Encoder, Texts, collect


class Chatting:
    """A tokenizer of letters with a chat template around them."""

    chat_template = "a template"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def apply_chat_template(
        self, messages: list[dict[str, Any]], tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize
        assert add_generation_prompt
        return "<" + "|".join(message["content"] for message in messages) + ">"


def shown(ids: list[int] | None) -> str | None:
    return None if ids is None else "".join(map(chr, ids))


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def collected(files: list[Path], held_out: Path | None = None, raw: bool = False) -> Texts:
    return collect(
        Encoder(Chatting(), raw=raw),
        files,
        held_out,
        field="text",
        longest=600,
        evaluated=4,
        seed=0,
    )


def test_prompts_are_chats_and_their_template_stays_whole() -> None:
    encoder = Encoder(Chatting(), raw=False)
    assert shown(encoder.prompt("question", 20)) == "<question>"
    assert shown(encoder.prompt("question", 6)) == "<ques>"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert shown(encoder.prompt(messages, 6)) == "<a|b>"
    assert encoder.prompt(messages, 4) is None


def test_raw_leaves_the_template_out() -> None:
    encoder = Encoder(Chatting(), raw=True)
    assert shown(encoder.prompt("question", 4)) == "ques"
    assert shown(encoder.prompt([{"content": "a"}, {"content": "b"}], 9)) == "a\nb"


def test_files_give_prompts_and_passages(tmp_path: Path) -> None:
    rows = jsonl(
        tmp_path / "rows.jsonl", {"prompt": "ask me"}, {"text": "read me"}, {"turns": ["t"]}
    )
    (tmp_path / "story.txt").write_text("once upon a time")
    found = collected([rows, tmp_path / "story.txt"], jsonl(tmp_path / "e.jsonl", {"prompt": "x"}))
    prompts = {shown(ids) for ids in found.prompts}
    assert {"<ask me>", "<t>", f"<{PROMPTS[0]}>"} <= prompts
    assert {shown(ids) for ids in found.passages} == {"read me", "once upon a time"}
    # A chatting target is asked about the passages.
    assert sum("once upon a time" in str(p) for p in prompts) == 1
    raw = collected([tmp_path / "story.txt"], raw=True)
    assert "once upon a time" in {shown(ids) for ids in (*raw.prompts, *raw.held_out)}


def test_held_out_prompts_are_not_trained_on(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}"} for i in range(9)]
    inputs = jsonl(tmp_path / "in.jsonl", *rows)
    held_out = jsonl(tmp_path / "eval.jsonl", *rows[:6])
    found = collected([inputs], held_out)
    prompts = {shown(ids) for ids in found.prompts}
    # Six are left out, though only four are evaluated.
    assert len(found.held_out) == 4
    assert found.left_out == 6
    assert not any(f"<question {i}>" in prompts for i in range(6))
    assert all(f"<question {i}>" in prompts for i in range(6, 9))


def test_without_a_file_some_are_put_aside() -> None:
    found = collected([])
    prompts = {shown(ids) for ids in found.prompts}
    aside = {shown(ids) for ids in found.held_out}
    assert len(aside) == 4
    assert not prompts & aside
    assert len(prompts) + len(aside) == len(PROMPTS)
    assert collected([]) == found


def test_the_targets_own_tokenizer(target_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(target_folder)
    ids = Encoder(tokenizer, raw=False).prompt("hello", 20)
    assert ids is not None
    assert tokenizer.decode(ids).replace(" ", "") == "hello\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "is empty"),
        ("a.txt", b"\xff\xfe\xff", "decode"),
        ("a.jsonl", "{", r"a.jsonl:1: not JSON"),
        ("a.jsonl", '{"prompt": "x"}\n{"question": "y"}', r"a.jsonl:2: needs .* or a text under"),
        ("a.jsonl", "[1]", "must be an object"),
    ],
)
def test_files_that_cannot_be_used(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DistillError, match=message):
        collected([path])


def test_a_missing_file_or_an_empty_evaluation(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"none\.txt"):
        collected([tmp_path / "none.txt"])
    with pytest.raises(DistillError, match="holds no prompts"):
        collected([], jsonl(tmp_path / "empty.jsonl"))
