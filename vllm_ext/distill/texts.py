# SPDX-License-Identifier: Apache-2.0
"""What the target reads and is asked: prompts and passages as token ids, from files or built in."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_ext.cli.prompts import PromptFileError, load_prompts, parse_prompt
from vllm_ext.distill.errors import DistillError
from vllm_ext.distill.seeds import ABOUT_A_PASSAGE, PROMPTS

Content = str | list[dict[str, Any]]

LONGEST_EVALUATED = 384
_PIECE_CHARACTERS = 500


@dataclass(frozen=True)
class Texts:
    """Token ids, in a random order that the seed decides.

    Attributes:
        prompts: what the target writes a continuation of.
        passages: what it reads, documents of any length.
        held_out: prompts for the evaluation; none of them is among `prompts`.
        left_out: how many prompts were not taken because they are held out.
    """

    prompts: list[list[int]]
    passages: list[list[int]]
    held_out: list[list[int]]
    left_out: int


class Encoder:
    """Texts and conversations as the target gets them.

    Args:
        tokenizer: the target's (transformers).
        raw: leave out the chat template that the tokenizer has.
    """

    def __init__(self, tokenizer: Any, *, raw: bool) -> None:
        self._tokenizer = tokenizer
        self.chats = bool(tokenizer.chat_template) and not raw

    def passage(self, text: str) -> list[int]:
        """A text as it is, with the special tokens that the tokenizer adds by itself."""
        return list(self._tokenizer(text)["input_ids"])

    def prompt(self, content: Content, longest: int) -> list[int] | None:
        """A question with everything around it; `None` if messages have over `longest` tokens.

        Of a text that is too long the end is cut off, and the template stays whole.
        """
        if not isinstance(content, str):
            if self.chats:
                ids = self._conversation(content)
                return ids if len(ids) <= longest else None
            content = "\n".join(str(message.get("content", "")) for message in content)
        ids = self._asked(content)
        excess = len(ids) - longest
        if excess <= 0:
            return ids
        inner = self._tokenizer(content, add_special_tokens=False)["input_ids"]
        # Cutting can shift where tokens begin, hence the limit again.
        return self._asked(self._tokenizer.decode(inner[: max(1, len(inner) - excess)]))[:longest]

    def _asked(self, text: str) -> list[int]:
        if self.chats:
            return self._conversation([{"role": "user", "content": text}])
        return self.passage(text)

    def _conversation(self, messages: list[dict[str, Any]]) -> list[int]:
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        # The template writes the special tokens itself.
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def collect(
    encoder: Encoder,
    files: Sequence[Path],
    held_out: Path | None,
    *,
    field: str,
    longest: int,
    evaluated: int,
    seed: int,
) -> Texts:
    """Prompts and passages of `files` and the built-in prompts, without those held out.

    Args:
        encoder: of the target.
        files: texts, or JSON lines with a prompt or with a text under `field`.
        held_out: prompt file for the evaluation; if `None`, prompts are put aside for it.
        field: key of the text in JSON lines without a prompt.
        longest: most tokens of a prompt.
        evaluated: most prompts of the evaluation; they may be longer.
        seed: of the order.

    Raises:
        DistillError: if a file cannot be read or has nothing to offer.
    """
    contents: list[Content] = list(PROMPTS)
    passages: list[str] = []
    for path in files:
        found_prompts, found_passages = _read(path, field)
        contents += found_prompts
        passages += found_passages
    encoded = [encoder.passage(text) for text in passages]
    contents += _about(passages) if encoder.chats else _pieces(passages)
    order = random.Random(seed)
    order.shuffle(contents)
    order.shuffle(encoded)
    if held_out is None:
        aside = contents[: min(evaluated, len(contents) // 8)]
    else:
        # All of them are kept out of the training, even those that are not evaluated.
        aside = _prompts(held_out)
    known = {_key(content) for content in aside}
    kept = [content for content in contents if _key(content) not in known]
    return Texts(
        prompts=[ids for content in kept if (ids := encoder.prompt(content, longest))],
        passages=encoded,
        held_out=[
            ids
            for content in _evenly(aside, evaluated)
            if (ids := encoder.prompt(content, LONGEST_EVALUATED))
        ],
        left_out=len(contents) - len(kept),
    )


def _pieces(passages: Sequence[str]) -> list[Content]:
    """Passages as beginnings of texts."""
    return [
        text[i : i + _PIECE_CHARACTERS]
        for text in passages
        for i in range(0, len(text), _PIECE_CHARACTERS)
    ]


def _about(passages: Sequence[str]) -> list[Content]:
    """Questions about passages, for a target that answers."""
    return [
        ABOUT_A_PASSAGE[i % len(ABOUT_A_PASSAGE)].format(piece)
        for i, piece in enumerate(_pieces(passages))
    ]


def _key(content: Content) -> str:
    return json.dumps(content, sort_keys=True)


def _read(path: Path, field: str) -> tuple[list[Content], list[str]]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DistillError(f"input {path}: {error}") from error
    if not content.strip():
        raise DistillError(f"input {path} is empty: give text, or JSON lines")
    if path.suffix != ".jsonl":
        return [], [content]
    prompts: list[Content] = []
    texts: list[str] = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"input {path}:{number}"
        text = _text_of(line, field, where)
        if text is not None:
            texts.append(text)
            continue
        try:
            prompts.append(parse_prompt(line, where).content)
        except PromptFileError as error:
            raise DistillError(f"{error}, or a text under {field!r} (--field)") from error
    return prompts, texts


def _text_of(line: str, field: str, where: str) -> str | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DistillError(f"{where}: not JSON ({error})") from error
    value = row.get(field) if isinstance(row, dict) else None
    return value if isinstance(value, str) and value else None


def _prompts(path: Path) -> list[Content]:
    try:
        return [prompt.content for prompt in load_prompts(path)]
    except (PromptFileError, OSError, UnicodeDecodeError) as error:
        raise DistillError(str(error)) from error


def _evenly(items: list[Content], count: int) -> list[Content]:
    """At most `count` of `items`, evenly spaced, so that every task of a sorted file is there."""
    if len(items) <= count:
        return items
    return [items[i * len(items) // count] for i in range(count)]
