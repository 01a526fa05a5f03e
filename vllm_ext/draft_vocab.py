# SPDX-License-Identifier: Apache-2.0
"""The tokens that a draft model may draft: FR-Spec (arXiv 2502.14856).

Most of a small draft's time goes into its output layer, which scores every token of the vocabulary,
rare ones too. Few tokens are most of a text, so a draft that scores only those loses a few guesses
and most of that time. What the target says is not touched: verification needs no more of a draft
than that its distribution is known, and here it is zero for all other tokens.

The file lies in the draft model's folder, whose token ids it lists in ascending order.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

FILE = "draft_vocab.json"
LEAST = 64
_FORMAT = "vllm-ext draft vocabulary"
_VERSION = 1
_MOST_BYTES = 1 << 25


class DraftVocabError(ValueError):
    """The file cannot be used; the message says why and what to do."""


def save(path: Path, tokens: Sequence[int]) -> None:
    """Write the file, whole or not at all.

    Args:
        path: of the file; its folder exists.
        tokens: ids, in any order.
    """
    content = {"format": _FORMAT, "version": _VERSION, "tokens": sorted(tokens)}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(part, path)


def load(path: Path, vocab_size: int) -> list[int]:
    """Token ids, ascending.

    Args:
        path: of the file.
        vocab_size: ids are below it.

    Raises:
        DraftVocabError: it cannot be read, is another file, or lists something else.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DraftVocabError(f"{path}: larger than {_MOST_BYTES} bytes, no draft vocabulary")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, DraftVocabError):
            raise
        raise DraftVocabError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise DraftVocabError(f"{path} is no draft vocabulary; `vllm-ext distill` writes them")
    if content.get("version") != _VERSION:
        raise DraftVocabError(
            f"{path} has version {content.get('version')!r}, this program reads {_VERSION}: "
            "distill the draft again, or leave it out with draft_vocab='off'"
        )
    tokens = content.get("tokens")
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise DraftVocabError(f"{path}: its tokens are no list of ids")
    if len(tokens) < LEAST:
        raise DraftVocabError(f"{path} lists {len(tokens)} tokens; at least {LEAST} are needed")
    if any(low >= high for low, high in itertools.pairwise(tokens)):
        raise DraftVocabError(f"{path}: its tokens are not in ascending order")
    if tokens[0] < 0 or tokens[-1] >= vocab_size:
        raise DraftVocabError(
            f"{path} lists tokens from {tokens[0]} to {tokens[-1]}, and the draft model has "
            f"{vocab_size}: it belongs to another model"
        )
    return tokens


def path_of(option: str | None, folder: Path) -> Path | None:
    """Where the vocabulary of a draft model is, or ``None`` if all tokens are drafted.

    Args:
        option: ``draft_vocab``: a path, ``"off"``, or ``None`` for the file in the model's folder
            if there is one.
        folder: of the draft model.
    """
    if option == "off":
        return None
    if option is not None:
        return Path(option).expanduser()
    found = folder / FILE
    return found if found.is_file() else None
