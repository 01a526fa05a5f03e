# SPDX-License-Identifier: Apache-2.0
"""A corpus on disk to draft from (REST, arXiv 2311.08252): token ids and their suffix array.

A folder with three files: a small JSON header, the token ids of all documents, and the positions of
all suffixes in lexicographic order. Both arrays are memory-mapped, so the workers of a machine
share one copy and nothing is read before it is needed. Token ids are big-endian: the order of their
bytes is then the order of the ids, and a lookup is a binary search over slices of bytes.

The files hold no code. Sizes and digests in the header are compared with the files when a datastore
is opened: a truncated, foreign or damaged one is refused.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import stat
from bisect import bisect_left, bisect_right
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

FORMAT = "vllm-ext-datastore"
VERSION = 1
HEADER, TOKENS, SUFFIXES = "datastore.json", "tokens.bin", "suffixes.bin"
_MAX_HEADER = 1 << 16


class DatastoreError(ValueError):
    """A datastore cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a datastore is.

    Attributes:
        tokenizer: hash of the tokenizer that made the ids.
        vocab_size: every id is below it; documents end with the largest value of `width` bytes.
        tokens: ids and document ends.
        documents: texts.
        width: bytes per token, 2 or 4.
        index_width: bytes per position, 4 or 8.
        tokens_digest: BLAKE2b of the token file.
        suffixes_digest: BLAKE2b of the suffix file.
        format: `FORMAT`.
        version: `VERSION`.
    """

    tokenizer: str
    vocab_size: int
    tokens: int
    documents: int
    width: int
    index_width: int
    tokens_digest: str
    suffixes_digest: str
    format: str = FORMAT
    version: int = VERSION

    def to_json(self) -> str:
        """The text of the header file."""
        return json.dumps(asdict(self), indent=1)


def token_width(vocab_size: int) -> int:
    """Bytes per token: the largest value is kept for ends of documents."""
    return 2 if vocab_size < 2**16 else 4


def digest_of(path: Path) -> str:
    """BLAKE2b of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def read_header(folder: Path) -> Header:
    """The header of a datastore; the other files are not looked at.

    Raises:
        DatastoreError: if there is no readable header of this version.
    """
    path = folder / HEADER
    try:
        _require_regular(path)
        if path.stat().st_size > _MAX_HEADER:
            raise DatastoreError(
                f"datastore {folder}: the header has {path.stat().st_size} bytes, at most "
                f"{_MAX_HEADER} are allowed: not a datastore of `vllm-ext datastore build`"
            )
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, DatastoreError):
            raise
        raise DatastoreError(f"datastore {folder}: {HEADER} cannot be read ({error})") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise DatastoreError(f"datastore {folder}: not made by `vllm-ext datastore build`")
    if found.get("version") != VERSION:
        raise DatastoreError(
            f"datastore {folder}: version {found.get('version')!r}, this program reads {VERSION}; "
            "build it again"
        )
    types = {field.name: str if field.type == "str" else int for field in fields(Header)}
    if {name: type(value) for name, value in found.items()} != types:
        raise DatastoreError(f"datastore {folder}: the header's entries must be {types}")
    header = Header(**found)
    sane = (
        header.width in (2, 4)
        and header.index_width in (4, 8)
        and header.tokens >= 1
        and 1 <= header.vocab_size < 256**header.width
    )
    if not sane:
        raise DatastoreError(f"datastore {folder}: the header contradicts itself ({header})")
    return header


class Datastore:
    """An opened datastore: read-only, for any number of readers.

    Args:
        folder: of the datastore.
        tokenizer: hash of the tokenizer in use; `None` accepts any.

    Raises:
        DatastoreError: if it cannot be used with this tokenizer.
    """

    def __init__(self, folder: Path, tokenizer: str | None) -> None:
        self.header = header = read_header(folder)
        if tokenizer is not None and header.tokenizer != tokenizer:
            raise DatastoreError(
                f"datastore {folder}: made with another tokenizer ({header.tokenizer}, this model "
                f"has {tokenizer}); build one for this model"
            )
        sizes = {TOKENS: header.tokens * header.width, SUFFIXES: header.tokens * header.index_width}
        digests = {TOKENS: header.tokens_digest, SUFFIXES: header.suffixes_digest}
        maps = {}
        for name, size in sizes.items():
            path = folder / name
            try:
                _require_regular(path)
                if path.stat().st_size != size:
                    raise DatastoreError(
                        f"datastore {folder}: {name} has {path.stat().st_size} bytes, the header "
                        f"says {size}: truncated or mixed up; build it again"
                    )
                if digest_of(path) != digests[name]:
                    raise DatastoreError(
                        f"datastore {folder}: {name} is damaged (its digest differs); build it "
                        "again"
                    )
                with path.open("rb") as file:
                    maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise DatastoreError(
                    f"datastore {folder}: {name} cannot be read ({error})"
                ) from error
        self._width = header.width
        self._bytes = maps[TOKENS]
        self._order = memoryview(maps[SUFFIXES]).cast("I" if header.index_width == 4 else "Q")

    def __len__(self) -> int:
        return self.header.tokens

    def encode(self, tokens: list[int]) -> bytes | None:
        """Tokens as they stand in the file; `None` if one of them cannot occur there."""
        if any(not 0 <= token < self.header.vocab_size for token in tokens):
            return None
        return b"".join(token.to_bytes(self._width, "big") for token in tokens)

    def find(self, pattern: bytes, low: int, high: int, skip: int = 0) -> tuple[int, int]:
        """The part of [low, high) whose suffixes go on with `pattern` after `skip` bytes.

        All suffixes in [low, high) must agree in their first `skip` bytes.
        """
        order, text, width, size = self._order, self._bytes, self._width, len(pattern)

        def key(i: int) -> bytes:
            at = order[i] * width + skip
            return text[at : at + size]

        first = bisect_left(range(high), pattern, low, high, key=key)
        return first, bisect_right(range(high), pattern, first, high, key=key)

    def following(self, low: int, high: int, skip: int, most: int) -> list[int]:
        """The tokens after the first `skip` bytes of at most `most` of these suffixes.

        Taken at even distances: suffixes are ordered by what follows, so each token gets its share.
        """
        order, text, width, count = self._order, self._bytes, self._width, high - low
        end, vocab_size, found = len(text), self.header.vocab_size, []
        picks = (
            range(low, high) if count <= most else (low + i * count // most for i in range(most))
        )
        for i in picks:
            at = order[i] * width + skip
            if at + width <= end:
                token = int.from_bytes(text[at : at + width], "big")
                if token < vocab_size:
                    found.append(token)
        return found

    def text(self, position: int, count: int) -> list[int]:
        """`count` tokens from a position on, ends of documents left out."""
        raw = self._bytes[position * self._width : (position + count) * self._width]
        ids = np.frombuffer(raw, f">u{self._width}").astype(np.int64)
        return [int(token) for token in ids if token < self.header.vocab_size]

    def position(self, i: int) -> int:
        """Where the i-th suffix begins."""
        return int(self._order[i])


def _require_regular(path: Path) -> None:
    """Refuse what is no plain file: opening a pipe would wait for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path} is no regular file")
