# SPDX-License-Identifier: Apache-2.0
"""Labelled sequences on disk, made batch by batch until the time for it is over.

A batch is one file that depends only on the seed, its number and the texts, and appears under its
name when it is complete: what a kill costs is the batch that was being made.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_ext.distill.teacher import TEMPERATURES, Labelled, Stream, read, write
from vllm_ext.distill.texts import Texts

# Reading is cheaper than writing and covers what users paste, but a draft proposes answers.
_READ_EVERY = 4
_READ_ROWS = 4


@dataclass(frozen=True)
class DataSettings:
    """How sequences are made.

    Attributes:
        length: tokens of a sequence.
        rows: sequences of a batch.
        answer: most tokens of one answer within a sequence.
        top_k: next tokens kept per position.
        seed: of prompts and draws.
    """

    length: int
    rows: int
    answer: int
    top_k: int
    seed: int


def make(
    target: Any,
    texts: Texts,
    ends: Sequence[int],
    folder: Path,
    settings: DataSettings,
    budget: float,
    clock: Callable[[], float],
    advance: Callable[[float, str], None],
) -> float:
    """Add batches to `folder` while half of one more fits into `budget` seconds; at least one.

    Returns:
        The seconds spent on all batches that are there, earlier runs included.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spent = sum(map(_seconds, _shards(folder)))
    done = len(_shards(folder))
    advance(spent, f"{done * settings.rows * settings.length} tokens")
    pages = _pages(texts.passages, ends[0], settings.length)
    while done == 0 or spent + spent / done / 2 < budget:
        begin = last = clock()

        def tick(tokens: int, number: int = done) -> None:
            nonlocal last
            now = clock()
            advance(now - last, f"batch {number + 1}: {settings.rows} sequences")
            last = now

        batch = _batch(target, texts, pages, ends, settings, done, tick)
        seconds = clock() - begin
        path = folder / f"batch-{done:06}.safetensors"
        part = path.with_suffix(".part")
        tensors = {"tokens": batch.tokens, "ids": batch.ids, "probs": batch.probs}
        save_file(tensors, part, metadata={"seconds": repr(seconds)})
        os.replace(part, path)
        spent += seconds
        done += 1
    return spent


def load(folder: Path) -> Labelled:
    """All batches of `folder`, in the order in which they were made."""
    parts: dict[str, list[Tensor]] = {"tokens": [], "ids": [], "probs": []}
    for path in _shards(folder):
        with safe_open(path, framework="pt") as file:
            for name, tensors in parts.items():
                tensors.append(file.get_tensor(name))
    return Labelled(**{name: torch.cat(tensors) for name, tensors in parts.items()})


def _batch(
    target: Any,
    texts: Texts,
    pages: Tensor,
    ends: Sequence[int],
    settings: DataSettings,
    number: int,
    tick: Callable[[int], None],
) -> Labelled:
    chance = random.Random(f"{settings.seed}/{number}")
    first = number // _READ_EVERY * settings.rows
    if number % _READ_EVERY == _READ_EVERY - 1 and first + settings.rows <= len(pages):
        chosen = pages[first : first + settings.rows]
        return read(target, chosen, settings.top_k, _READ_ROWS, tick)
    writers = [
        Stream(
            _endless(texts.prompts, chance),
            ends,
            settings.answer,
            TEMPERATURES[row % len(TEMPERATURES)],
        )
        for row in range(settings.rows)
    ]
    generator = torch.Generator().manual_seed(chance.getrandbits(62))
    return write(target, writers, settings.length, settings.top_k, generator, tick)


def _endless(prompts: Sequence[list[int]], chance: random.Random) -> Iterator[list[int]]:
    while True:
        yield chance.choice(prompts)


def _pages(passages: Sequence[list[int]], end: int, length: int) -> Tensor:
    """Passages one after another, cut into sequences, int64 [pages, length]."""
    stream = [token for passage in passages for token in (*passage, end)]
    pages = len(stream) // length
    return torch.tensor(stream[: pages * length], dtype=torch.int64).reshape(pages, length)


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("batch-*.safetensors"))


def _seconds(path: Path) -> float:
    with safe_open(path, framework="pt") as file:
        return float(file.metadata()["seconds"])
