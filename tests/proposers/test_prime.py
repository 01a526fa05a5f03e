# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from proposers import BigramRecycling, VerifiedRows
from proposers.prime import KIND, PrimeError, PrimeTable
from proposers.stored import read_metadata

VOCAB = 50
IDENTITY = {"model": "m1", "tokenizer": "t1"}


def table() -> PrimeTable:
    return PrimeTable(
        np.array([3, 7], np.int32),
        np.array([[4, 5], [8, 9]], np.int32),
        np.array([[0.6, 0.3], [0.9, 0.0]], np.float32),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "new" / "p.safetensors"
    table().save(path, IDENTITY)
    return path


def test_round_trip(path: Path) -> None:
    loaded = PrimeTable.load(path, IDENTITY, VOCAB)
    for name in ("tokens", "ids", "probs"):
        assert (getattr(loaded, name) == getattr(table(), name)).all()
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no scratch file left


@pytest.mark.parametrize("name", ["model", "tokenizer"])
def test_another_model_is_refused(path: Path, name: str) -> None:
    with pytest.raises(PrimeError, match=f"made for {name}.*run `vllm-ext prime`"):
        PrimeTable.load(path, {**IDENTITY, name: "other"}, VOCAB)


def test_tokens_beyond_the_vocabulary_are_refused(path: Path) -> None:
    with pytest.raises(PrimeError, match="out of range"):
        PrimeTable.load(path, IDENTITY, 9)
    assert len(PrimeTable.load(path, IDENTITY, 10)) == 2


def rewritten(path: Path, **changes: str) -> None:
    """Change entries of the header's metadata and keep the rest of the file."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["__metadata__"].update(changes)
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + size :])


def test_damage_is_named(path: Path) -> None:
    whole = path.read_bytes()
    cases = [
        (whole[:-3], "cannot be read"),
        (whole[:40], "not a file of"),
        (b"", "claims 0 bytes"),
        (b"\xff" * 8 + whole[8:], "claims 18446744073709551615 bytes, at most"),
        (whole[:8] + b"[" * 200, "not a file of"),
        (b"nonsense" * 100, "at most"),
    ]
    for content, message in cases:
        path.write_bytes(content)
        with pytest.raises(PrimeError, match=message):
            PrimeTable.load(path, IDENTITY, VOCAB)
    path.write_bytes(whole)
    PrimeTable.load(path, IDENTITY, VOCAB)  # control: the undamaged file still loads
    rewritten(path, version="0")
    with pytest.raises(PrimeError, match="version '0', this program reads '1'"):
        read_metadata(path, KIND)
    rewritten(path, version="1", format="something")
    with pytest.raises(PrimeError, match="not a file of"):
        read_metadata(path, KIND)
    with pytest.raises(PrimeError, match="cannot be read"):
        PrimeTable.load(path.parent / "absent", IDENTITY, VOCAB)


def test_a_type_that_numpy_lacks_is_refused(path: Path) -> None:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    old = b'"dtype":"F32","shape":[2,2]'
    assert old in raw
    header = raw[8 : 8 + size].replace(old, b'"dtype":"BF16","shape":[2,4]')
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    with pytest.raises(PrimeError):
        PrimeTable.load(path, IDENTITY, VOCAB)


def test_a_huge_file_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(KIND, most=path.stat().st_size - 1)
    monkeypatch.setattr("proposers.prime.KIND", small)
    with pytest.raises(PrimeError, match="larger than"):
        PrimeTable.load(path, IDENTITY, VOCAB)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probs": np.array([[0.6, np.nan], [0.9, 0.0]], np.float32)}, "out of range"),
        ({"probs": np.array([[0.6, 0.6], [0.9, 0.0]], np.float32)}, "out of range"),
        ({"ids": np.array([[-4, 5], [8, 9]], np.int32)}, "out of range"),
        ({"tokens": np.array([3, 3], np.int32)}, "occurs twice"),
        ({"tokens": np.array([3], np.int32)}, "do not fit"),
        ({"ids": np.array([[4, 5], [8, 9]], np.int64)}, "not tokens, ids and probs"),
    ],
)
def test_contents_are_checked(tmp_path: Path, change: dict, message: str) -> None:
    good = {name: getattr(table(), name) for name in ("tokens", "ids", "probs")}
    path = tmp_path / "p"
    PrimeTable(**{**good, **change}).save(path, IDENTITY)
    with pytest.raises(PrimeError, match=message):
        PrimeTable.load(path, IDENTITY, VOCAB)


def test_recycling_drafts_from_it_until_it_knows_better() -> None:
    primed = BigramRecycling(VOCAB, prime=table())
    empty = BigramRecycling(VOCAB)
    for source in (primed, empty):
        source.start("r", [1, 3], greedy=True)
        source.start("adapted", [1, 3], greedy=True, namespace=4)
    for request in ("r", "adapted"):
        assert primed.candidates(primed.root(request))[1] == pytest.approx({4: 0.6, 5: 0.3})
        assert empty.candidates(empty.root(request)) == (0, {})
    seen = VerifiedRows(
        np.array([[1, 3]], np.int64),
        np.array([[6, 4]], np.int64),
        np.array([[0.8, 0.1]], np.float32),
        np.zeros(1, np.int64),
    )
    for _ in range(4):
        primed.observe(seen)
    found = primed.candidates(primed.root("r"))[1]
    assert max(found, key=found.__getitem__) == 6
    assert found[6] > 0.7
    # What one adapter's requests show stays there.
    assert primed.candidates(primed.root("adapted"))[1] == pytest.approx({4: 0.6, 5: 0.3})
