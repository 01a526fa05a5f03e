# SPDX-License-Identifier: Apache-2.0
"""Builds a datastore: texts are tokenized piece by piece, then sorted by suffix.

The build may be killed at any time. A journal says after every piece how much of which input the
token file stands for; the same command goes on from there, or begins anew if the file is shorter
than that. The header is written last, so that a folder is a datastore or none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from proposers.datastore import (
    HEADER,
    SUFFIXES,
    TOKENS,
    DatastoreError,
    Header,
    digest_of,
    token_width,
)

_JOURNAL = "build.json"
_PIECE = 1 << 20
"""Bytes of input between two entries of the journal."""

Encode = Callable[[list[str]], list[list[int]]]
Advance = Callable[[int, str], None]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Texts from one input, where the input goes on, and whether each text ends a document."""

    texts: list[str]
    end: int
    closed: list[bool]


def build(
    inputs: Sequence[Path],
    folder: Path,
    *,
    encode: Encode,
    tokenizer: str,
    vocab_size: int,
    field: str = "text",
    advance: Advance = lambda size, doing: None,
) -> Header:
    """Write a datastore of the inputs, or go on with a build that was interrupted.

    Args:
        inputs: text files, or JSON lines (``.jsonl``) with a text in `field`.
        folder: of the datastore; made if need be.
        encode: token ids of a list of texts, without special tokens.
        tokenizer: hash of the tokenizer.
        vocab_size: every id is below it.
        field: key of the text in JSON lines.
        advance: told of every piece: bytes of input, and what is being done.

    Raises:
        DatastoreError: if an input cannot be read or holds no text, or the folder holds a datastore
            or another build.
    """
    from pydivsufsort import divsufsort

    folder.mkdir(parents=True, exist_ok=True)
    if (folder / HEADER).exists():
        raise DatastoreError(
            f"{folder} already holds a datastore; remove it or choose another --out"
        )
    plan = {
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "field": field,
        "inputs": [_fingerprint(path) for path in inputs],
    }
    width = token_width(vocab_size)
    tokens, documents = _tokenize(inputs, folder, plan, encode, width, field, advance)
    if not tokens:
        raise DatastoreError(f"the inputs hold no text: {', '.join(map(str, inputs))}")
    advance(0, "sorting suffixes")
    # divsufsort sorts bytes; suffixes that begin at a token are those at multiples of its width.
    order = divsufsort(np.fromfile(folder / TOKENS, np.uint8))
    order = order[order % width == 0] // width
    index_width = 4 if tokens < 2**32 else 8
    order.astype(f"<u{index_width}").tofile(folder / SUFFIXES)
    header = Header(
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        tokens=tokens,
        documents=documents,
        width=width,
        index_width=index_width,
        tokens_digest=digest_of(folder / TOKENS),
        suffixes_digest=digest_of(folder / SUFFIXES),
    )
    (folder / f".{HEADER}").write_text(header.to_json(), encoding="utf-8")
    os.replace(folder / f".{HEADER}", folder / HEADER)
    (folder / _JOURNAL).unlink()
    return header


def _tokenize(
    inputs: Sequence[Path],
    folder: Path,
    plan: dict[str, object],
    encode: Encode,
    width: int,
    field: str,
    advance: Advance,
) -> tuple[int, int]:
    """Token ids of all inputs in the token file; their number and the number of documents."""
    end = np.array([256**width - 1], f">u{width}")
    with (folder / TOKENS).open("ab") as file:
        done = _resume(folder, plan, file.tell() // width)
        file.truncate(done["tokens"] * width)
        for number, path in enumerate(inputs):
            if number < done["input"]:
                advance(path.stat().st_size, f"{path.name} (done)")
                continue
            start = done["offset"] if number == done["input"] else 0
            advance(start, path.name)
            for piece in _pieces(path, start, field):
                ids = encode(piece.texts)
                for text, closed in zip(ids, piece.closed, strict=True):
                    np.array(text, f">u{width}").tofile(file)
                    if closed:
                        end.tofile(file)
                file.flush()
                done["tokens"] += sum(map(len, ids)) + sum(piece.closed)
                done["documents"] += sum(piece.closed)
                done.update(input=number, offset=piece.end)
                _write_journal(folder, plan, done)
                advance(piece.end - start, path.name)
                start = piece.end
            done.update(input=number + 1, offset=0)
            _write_journal(folder, plan, done)
    return done["tokens"], done["documents"]


def _pieces(path: Path, start: int, field: str) -> Iterator[_Piece]:
    """The texts of an input from a byte on; a long text is cut at ends of lines."""
    lines = path.suffix == ".jsonl"
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            file.seek(start)
            while file.tell() < size:
                raw = file.read(_PIECE) + file.readline()
                at = file.tell()
                if lines:
                    texts = [_text_of(line, path, field) for line in raw.splitlines()]
                    texts = [text for text in texts if text]
                    yield _Piece(texts, at, [True] * len(texts))
                else:
                    yield _Piece([raw.decode("utf-8", errors="replace")], at, [at >= size])
    except OSError as error:
        raise DatastoreError(f"{path}: cannot be read ({error})") from error


def _text_of(line: bytes, path: Path, field: str) -> str:
    if not line.strip():
        return ""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DatastoreError(f"{path}: a line is not JSON ({error})") from error
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        keys = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise DatastoreError(
            f"{path}: a line has no text in {field!r} (it has {keys}); name the key with --field"
        )
    return text


def _fingerprint(path: Path) -> list[object]:
    try:
        found = path.stat()
    except OSError as error:
        raise DatastoreError(f"{path}: cannot be read ({error})") from error
    return [str(path), found.st_size, found.st_mtime_ns]


def _resume(folder: Path, plan: dict[str, object], written: int) -> dict[str, int]:
    """How far an earlier build of the same plan got, if its `written` tokens are all there."""
    fresh = {"input": 0, "offset": 0, "tokens": 0, "documents": 0}
    path = folder / _JOURNAL
    if not path.exists():
        return fresh
    try:
        journal = json.loads(path.read_text(encoding="utf-8"))
        same = journal["plan"] == json.loads(json.dumps(plan))
        done = {key: int(journal["done"][key]) for key in fresh}
    except (ValueError, KeyError, TypeError) as error:
        raise DatastoreError(f"{path} is damaged ({error}); remove {folder}") from error
    if not same:
        raise DatastoreError(
            f"{folder} holds an unfinished build of other inputs or another model; remove it or "
            "choose another --out"
        )
    return done if 0 <= done["tokens"] <= written else fresh


def _write_journal(folder: Path, plan: dict[str, object], done: dict[str, int]) -> None:
    scratch = folder / f".{_JOURNAL}"
    scratch.write_text(json.dumps({"plan": plan, "done": done}), encoding="utf-8")
    os.replace(scratch, folder / _JOURNAL)
