# SPDX-License-Identifier: Apache-2.0
"""Prompt files: one JSON object per line with ``prompt``, ``messages`` or ``turns``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNNAMED_TASK = "all"
# File names that say which part of a data set a file is, not which data set.
SPLITS = frozenset({"train", "dev", "dev_more", "valid", "validation", "test", "eval", "prompts"})


class PromptFileError(ValueError):
    """The prompt file cannot be used; the message names the line and what is allowed there."""


@dataclass(frozen=True)
class Prompt:
    """One row of a prompt file.

    `content` is a text (row key "prompt", or the first of "turns") or a list of chat messages
    (row key "messages"); `task` is the row's "task", else its "category", else the name of its
    data set or "all"; `dataset` is the name of its file among those that were read together.
    """

    content: str | list[dict[str, Any]]
    task: str = UNNAMED_TASK
    dataset: str = ""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the engine gets it; `index` is its number (from 0) among the rows read."""

    index: int
    task: str
    token_ids: list[int]
    dataset: str = ""


def load_datasets(
    paths: Sequence[Path], limit: int | None = None, sample: int | None = None
) -> list[Prompt]:
    """Read several files, one after the other; tasks of several are called DATASET/TASK.

    Args:
        paths: Files of different names.
        limit: Only the first so many rows of each file.
        sample: Only so many rows of each file, evenly spaced.

    Raises:
        PromptFileError: As `load_prompts`, or a file is given twice.
    """
    prompts: list[Prompt] = []
    for path, name in zip(paths, dataset_names(paths), strict=True):
        rows = load_prompts(path, limit, unnamed_task=name)
        for row in rows if sample is None else evenly(rows, sample):
            qualified = len(paths) > 1 and row.task != name
            task = f"{name}/{row.task}" if qualified else row.task
            prompts.append(Prompt(row.content, task, name))
    return prompts


def dataset_names(paths: Sequence[Path]) -> list[str]:
    """A name per file, as short as tells them apart: file or folder, both, or the whole path.

    Raises:
        PromptFileError: A file is given twice.
    """
    whole = [path.resolve() for path in paths]
    for names in (
        [path.parent.name if path.stem in SPLITS else path.stem for path in whole],
        [f"{path.parent.name}/{path.stem}" for path in whole],
        [str(path) for path in whole],
    ):
        if len(set(names)) == len(names):
            return names
    raise PromptFileError(f"a prompt file is given twice: {', '.join(map(str, paths))}")


def evenly(rows: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` of the rows, evenly spaced from the first on; all if there are fewer."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def load_prompts(
    path: Path, limit: int | None = None, *, unnamed_task: str = UNNAMED_TASK
) -> list[Prompt]:
    """Read the rows of `path`, the first `limit` of them if given.

    Raises:
        PromptFileError: A line is not a JSON object with a usable prompt, or there is none.
    """
    prompts: list[Prompt] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if limit is not None and len(prompts) == limit:
            break
        if line.strip():
            prompts.append(parse_prompt(line, f"{path}:{number}", unnamed_task))
    if not prompts:
        raise PromptFileError(f"{path} holds no prompts: give one JSON object per line")
    return prompts


def fitting(
    prompts: Sequence[Prompt], token_ids: Sequence[list[int]], max_prompt_tokens: int
) -> list[EncodedPrompt]:
    """The prompts of at most `max_prompt_tokens` tokens, in file order.

    Raises:
        PromptFileError: None fits.
    """
    rows = zip(prompts, token_ids, strict=True)
    kept = [
        EncodedPrompt(index, prompt.task, ids, prompt.dataset)
        for index, (prompt, ids) in enumerate(rows)
        if len(ids) <= max_prompt_tokens
    ]
    if not kept:
        raise PromptFileError(
            f"no prompt has at most {max_prompt_tokens} tokens (the shortest has "
            f"{min(map(len, token_ids))}): raise --max-model-len or lower --max-tokens"
        )
    return kept


def parse_prompt(line: str, where: str, unnamed_task: str = UNNAMED_TASK) -> Prompt:
    """One line of a prompt file; `where` is what an error says of its place.

    Raises:
        PromptFileError: It is not a JSON object with a usable prompt.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptFileError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise PromptFileError(f"{where}: a {type(row).__name__}, but each line must be an object")
    task = row.get("task") or row.get("category") or unnamed_task
    return Prompt(_content(row, where), str(task))


def _content(row: dict[str, Any], where: str) -> str | list[dict[str, Any]]:
    prompt, messages, turns = row.get("prompt"), row.get("messages"), row.get("turns")
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
        return messages
    if isinstance(turns, list) and turns and isinstance(turns[0], str) and turns[0]:
        return turns[0]
    raise PromptFileError(
        f"{where}: needs 'prompt' (text), 'messages' (list of objects) or 'turns' (list of texts); "
        f"it has {sorted(row)}"
    )
