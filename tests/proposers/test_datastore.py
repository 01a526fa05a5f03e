# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proposers.datastore import HEADER, SUFFIXES, TOKENS, Datastore, DatastoreError, read_header
from proposers.datastore_build import build
from proposers.retrieval import DatastoreSource

pytest.importorskip("pydivsufsort", reason="building needs vllm-ext[datastore]")

VOCAB = 300
HASH = "t" * 32


def encode(texts: list[str]) -> list[list[int]]:
    """A token per character."""
    return [[ord(c) % VOCAB for c in text] for text in texts]


def make(folder: Path, *texts: str, vocab_size: int = VOCAB, name: str = "a.txt") -> Path:
    inputs = []
    for i, text in enumerate(texts):
        path = folder / f"{i}{name}"
        path.write_text(text, encoding="utf-8")
        inputs.append(path)
    out = folder / "store"
    build(inputs, out, encode=encode, tokenizer=HASH, vocab_size=vocab_size)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("ds"), "the cat sat on the mat. the cat ran.", "the end")


def ids(text: str) -> list[int]:
    return encode([text])[0]


def occurrences(store: Datastore, text: str) -> int:
    pattern = store.encode(ids(text))
    assert pattern is not None
    low, high = store.find(pattern, 0, len(store))
    return high - low


@pytest.mark.parametrize("vocab_size", [VOCAB, 70_000])  # two and four bytes per token
def test_finds_every_occurrence(tmp_path: Path, vocab_size: int) -> None:
    text = "abracadabra abracadabra"
    store = Datastore(make(tmp_path, text, vocab_size=vocab_size), HASH)
    for size in (1, 2, 3, 5, 11):
        for begin in range(len(text) - size):
            part = text[begin : begin + size]
            expected = sum(text.startswith(part, i) for i in range(len(text)))
            assert occurrences(store, part) == expected
    assert occurrences(store, "xyz") == 0
    assert store.encode([vocab_size]) is None
    assert store.encode([-1]) is None


@settings(deadline=None, max_examples=20)
@given(st.text(alphabet="abc", min_size=1, max_size=60), st.text(alphabet="abc", max_size=6))
def test_the_source_agrees_with_a_scan(text: str, context: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        store = Datastore(make(Path(scratch), text), HASH)
        source = DatastoreSource(store, VOCAB)
        source.start("r", ids(context), greedy=True)
        best = next(
            (context[-m:] for m in range(min(16, len(context)), 1, -1) if context[-m:] in text), ""
        )
        _, found = source.candidates(source.root("r"))
        following = [
            text[i + len(best)]
            for i in range(len(text) - len(best))
            if best and text.startswith(best, i)
        ]
        assert set(found) == set(ids("".join(following)))
        if len(following) <= 32:
            for token in found:
                share = ids("".join(following)).count(token) / len(following)
                assert found[token] == pytest.approx(share)


def test_a_drafted_token_narrows_the_range(folder: Path) -> None:
    source = DatastoreSource(Datastore(folder, HASH), VOCAB)
    source.start("r", ids("the "), greedy=True)
    state = source.root("r")
    assert set(source.candidates(state)[1]) == set(ids("cme"))
    for token in ids("cat "):
        state = source.advance(state, token)
    assert set(source.candidates(state)[1]) == set(ids("sr"))
    assert source.candidates(source.advance(state, ord("x"))) == (0, {})
    assert source.candidates(source.advance(state, VOCAB + 9)) == (0, {})
    assert source.candidates(source.advance(source.advance(state, ord("x")), 5)) == (0, {})


def test_extending_in_pieces_or_at_once_is_the_same(folder: Path) -> None:
    store = Datastore(folder, HASH)
    text = ids("zz the cat sat on the moon and the cat ran")
    whole, pieces = DatastoreSource(store, VOCAB), DatastoreSource(store, VOCAB)
    pieces.start("r", text[:1], greedy=True)
    for i in range(1, len(text)):
        pieces.extend("r", text[i : i + 1])
        whole.start("r", text[: i + 1], greedy=True)
        assert pieces.root("r") == whole.root("r")


def test_documents_do_not_run_into_each_other(folder: Path) -> None:
    store = Datastore(folder, HASH)
    source = DatastoreSource(store, VOCAB)
    source.start("r", ids("cat ran."), greedy=True)
    assert source.candidates(source.root("r")) == (0, {})
    assert store.header.documents == 2
    assert occurrences(store, "ran.the") == 0


def test_a_sample_of_a_large_range_keeps_the_shares(tmp_path: Path) -> None:
    store = Datastore(make(tmp_path, "zab" * 900 + "zac" * 100), HASH)
    source = DatastoreSource(store, VOCAB)
    source.start("r", ids("za"), greedy=True)
    found = source.candidates(source.root("r"))[1]
    assert found[ord("b")] == pytest.approx(0.9, abs=0.05)


# -- files that must be refused -------------------------------------------------------------------


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    out = tmp_path / "copy"
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    Datastore(out, HASH)  # control: the copy is fine
    return out


def edited(folder: Path, **changes: object) -> None:
    header = json.loads((folder / HEADER).read_text())
    (folder / HEADER).write_text(json.dumps({**header, **changes}))


def test_another_tokenizer_is_refused(copied: Path) -> None:
    with pytest.raises(DatastoreError, match=r"another tokenizer.*build one for this model"):
        Datastore(copied, "u" * 32)
    Datastore(copied, None)


@pytest.mark.parametrize("name", [TOKENS, SUFFIXES])
def test_truncated_and_damaged_files_are_refused(copied: Path, name: str) -> None:
    whole = (copied / name).read_bytes()
    (copied / name).write_bytes(whole[:-1])
    with pytest.raises(DatastoreError, match=f"{name} has .* truncated"):
        Datastore(copied, HASH)
    (copied / name).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(DatastoreError, match=f"{name} is damaged"):
        Datastore(copied, HASH)
    (copied / name).unlink()
    with pytest.raises(DatastoreError, match="cannot be read"):
        Datastore(copied, HASH)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not made by"),
        ({"version": 2}, "version 2, this program reads 1"),
        ({"tokens": 10**15}, "truncated or mixed up"),
        ({"tokens": -1}, "contradicts itself"),
        ({"width": 3}, "contradicts itself"),
        ({"width": True}, "entries must be"),
        ({"tokens": 1.5}, "entries must be"),
        ({"surprise": 1}, "entries must be"),
        ({"tokenizer": 5}, "entries must be"),
        ({"vocab_size": 10**9}, "contradicts itself"),
    ],
)
def test_headers_are_checked(copied: Path, changes: dict, message: str) -> None:
    edited(copied, **changes)
    with pytest.raises(DatastoreError, match=message):
        Datastore(copied, HASH)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", "not made by"),
        (b"[1, 2]", "not made by"),
        (b"\x80\x04K\x01.", "cannot be read"),
        (b"[" * 60_000, "cannot be read"),
        (b" " * 70_000, "at most 65536 are allowed"),
    ],
)
def test_foreign_and_hostile_headers_are_refused(
    copied: Path, content: bytes, message: str
) -> None:
    (copied / HEADER).write_bytes(content)
    with pytest.raises(DatastoreError, match=message):
        read_header(copied)


@pytest.mark.parametrize("name", [HEADER, TOKENS, SUFFIXES])
def test_an_unreadable_datastore_is_refused(
    copied: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied / name).chmod(0)
    if os.access(copied / name, os.R_OK):  # as root
        original = Path.open

        def denied(path: Path, *args: Any, **kwargs: Any) -> Any:
            if path == copied / name:
                raise PermissionError(13, "Permission denied")
            return original(path, *args, **kwargs)

        monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(DatastoreError, match=rf"{name} cannot be read .*Permission denied"):
        Datastore(copied, HASH)


def test_a_pipe_is_not_waited_for(copied: Path) -> None:
    (copied / HEADER).unlink()
    os.mkfifo(copied / HEADER)
    with pytest.raises(DatastoreError, match="no regular file"):
        read_header(copied)


def test_positions_beyond_the_text_are_harmless(copied: Path) -> None:
    """A forged suffix file with a matching digest: wrong drafts at worst."""
    from proposers.datastore import digest_of

    size = (copied / SUFFIXES).stat().st_size
    (copied / SUFFIXES).write_bytes(b"\xff" * size)
    edited(copied, suffixes_digest=digest_of(copied / SUFFIXES))
    source = DatastoreSource(Datastore(copied, HASH), VOCAB)
    source.start("r", ids("the cat"), greedy=True)
    assert source.candidates(source.root("r"))[1] == {}


# -- building ------------------------------------------------------------------------------------


class InterruptError(Exception):
    pass


def test_an_interrupted_build_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proposers.datastore_build._PIECE", 64)
    text = "\n".join(f"line {i} of the text" for i in range(60))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(
        "\n".join(json.dumps({"text": f"row {i}"}) for i in range(30))
    )
    inputs = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    plan = {"tokenizer": HASH, "vocab_size": VOCAB}
    straight = build(inputs, tmp_path / "straight", encode=encode, **plan)
    calls = []

    def failing(texts: list[str]) -> list[list[int]]:
        calls.append(texts)
        if len(calls) in (4, 15):
            raise InterruptError
        return encode(texts)

    for _ in range(2):
        with pytest.raises(InterruptError):
            build(inputs, tmp_path / "out", encode=failing, **plan)
        with pytest.raises(DatastoreError, match="cannot be read"):
            Datastore(tmp_path / "out", HASH)  # not a datastore before it is whole
    resumed = build(inputs, tmp_path / "out", encode=failing, **plan)
    assert resumed == straight
    assert len(calls) < 30  # what was done was not done again
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(
        [HEADER, SUFFIXES, TOKENS]
    )


KILLED_BUILD = """
import os, signal, sys
from pathlib import Path
from proposers.datastore_build import build

calls, replace = [], os.replace

def killing(*paths):
    calls.append(paths)
    if len(calls) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)

os.replace = killing
encode = lambda texts: [[ord(c) for c in text] for text in texts]
build([Path(sys.argv[2])], Path(sys.argv[3]), encode=encode, tokenizer=sys.argv[4], vocab_size=300)
"""


def test_a_build_killed_before_any_of_its_files_takes_its_place(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("the cat sat on the mat. " * 20)
    plan = {"encode": encode, "tokenizer": HASH, "vocab_size": VOCAB}
    straight = build([text], tmp_path / "straight", **plan)
    for number in range(1, 9):
        out = tmp_path / f"out{number}"
        command = [sys.executable, "-c", KILLED_BUILD, str(number), str(text), str(out), HASH]
        killed = subprocess.run(command, check=False, timeout=60).returncode
        if killed == 0:
            break
        assert killed == -signal.SIGKILL
        assert not (out / HEADER).exists()
        assert build([text], out, **plan) == straight
        assert occurrences(Datastore(out, HASH), "the cat") == 20
    assert killed == 0  # the last place was reached
    assert number > 3  # a piece, the end of an input, and the header


@pytest.mark.parametrize("left", [0, 11, None])
def test_a_build_whose_tokens_are_lost_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int | None
) -> None:
    monkeypatch.setattr("proposers.datastore_build._PIECE", 64)
    text = tmp_path / "a.txt"
    text.write_text("\n".join(f"line {i} of the text" for i in range(60)))
    plan = {"tokenizer": HASH, "vocab_size": VOCAB}
    straight = build([text], tmp_path / "straight", encode=encode, **plan)
    calls = []

    def failing(texts: list[str]) -> list[list[int]]:
        calls.append(texts)
        if len(calls) == 6:
            raise InterruptError
        return encode(texts)

    out = tmp_path / "out"
    with pytest.raises(InterruptError):
        build([text], out, encode=failing, **plan)
    (written,) = out.glob("tokens*")
    written.unlink() if left is None else os.truncate(written, left)
    assert build([text], out, encode=encode, **plan) == straight


def test_what_cannot_be_built_is_refused(tmp_path: Path, folder: Path) -> None:
    plan = {"encode": encode, "tokenizer": HASH, "vocab_size": VOCAB}
    with pytest.raises(DatastoreError, match="already holds a datastore"):
        build([], folder, **plan)
    with pytest.raises(DatastoreError, match=r"absent.txt: cannot be read"):
        build([tmp_path / "absent.txt"], tmp_path / "o1", **plan)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DatastoreError, match="hold no text"):
        build([tmp_path / "empty.txt"], tmp_path / "o2", **plan)
    (tmp_path / "rows.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DatastoreError, match=r"no text in 'text' \(it has \['body'\]\).*--field"):
        build([tmp_path / "rows.jsonl"], tmp_path / "o3", **plan)
    (tmp_path / "bad.jsonl").write_text("{nonsense\n")
    with pytest.raises(DatastoreError, match="not JSON"):
        build([tmp_path / "bad.jsonl"], tmp_path / "o4", **plan)
    build([tmp_path / "rows.jsonl"], tmp_path / "o5", field="body", **plan)
    done = dict.fromkeys(("input", "offset", "tokens", "documents"), 0)
    (tmp_path / "o6").mkdir()
    (tmp_path / "o6" / "build.json").write_text(json.dumps({"plan": {}, "done": done}))
    with pytest.raises(DatastoreError, match="unfinished build of other inputs"):
        build([tmp_path / "rows.jsonl"], tmp_path / "o6", field="body", **plan)
