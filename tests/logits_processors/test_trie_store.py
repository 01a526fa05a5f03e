# SPDX-License-Identifier: Apache-2.0
import io
import json
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_model import GRAMMAR, TINY, ToyModel, generate

from logits_processors.asap import Asap
from logits_processors.law import SamplingLaw
from logits_processors.prefix_trie import PrefixTrie
from logits_processors.trie_store import TrieStore, load_trie, save_trie, trie_key
from logits_processors.xgrammar_constraint import compile_xgrammar

LAW = SamplingLaw()


@pytest.fixture
def trie():
    trie = PrefixTrie(max_nodes=50)
    compiled = compile_xgrammar("ebnf", GRAMMAR, TINY)
    for seed in range(10):
        generate(Asap(LAW, trie), ToyModel(1), compiled, seed)
    return trie


def contents(node):
    children = {token: contents(child) for token, child in node.children.items()}
    return node.token, node.log_edge, node.log_live, node.log_rest, children


def test_a_saved_trie_comes_back_whole(trie, tmp_path):
    path = tmp_path / "trie.npz"
    save_trie(trie, "key", path)
    loaded = load_trie(path, "key")
    assert contents(loaded.root) == contents(trie.root)
    assert len(contents(loaded.root)[4]) > 0
    assert (loaded.num_nodes, loaded.max_nodes) == (trie.num_nodes, 50)
    assert all(child.parent is node for node in loaded for child in node.children.values())
    assert [p.name for p in tmp_path.iterdir()] == ["trie.npz"]


def test_another_key_or_file_is_refused(trie, tmp_path):
    path = tmp_path / "trie.npz"
    save_trie(trie, "key", path)
    with pytest.raises(ValueError, match="saved for key 'key', wanted 'other'"):
        load_trie(path, "other")
    path.write_bytes(pickle.dumps({"header": 1}))
    with pytest.raises(ValueError, match="not a saved trie"):
        load_trie(path, "key")
    np.savez(path, header=np.array([print], dtype=object))
    with pytest.raises(ValueError, match="not a saved trie"):
        load_trie(path, "key")
    with pytest.raises(ValueError, match="not a saved trie"):
        load_trie(tmp_path / "absent.npz", "key")


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("parent", 1, 7, "before its parent"),
        ("parent", 1, -3, "before its parent"),
        ("token", 2, -5, "negative token"),
        ("log_edge", 1, 0.5, "log_edge"),
        ("log_edge", 1, float("nan"), "log_edge"),
        ("log_edge", slice(None), 0.0, "exceed 1"),
        ("log_rest", 1, 2.0, "log_rest"),
        ("log_rest", 0, 0.0, "exceed 1"),
        ("log_rest", 0, float("nan"), "never visited"),
    ],
)
def test_impossible_contents_are_refused(trie, tmp_path, name, index, value, message):
    path = tmp_path / "trie.npz"
    save_trie(trie, "key", path)
    with np.load(path) as file:
        arrays = {key: file[key].copy() for key in file.files if key != "allow_pickle"}
    np.savez(path, **arrays)
    load_trie(path, "key")  # the untouched copy is fine
    arrays[name][index] = value
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message):
        load_trie(path, "key")


def saved(trie, folder):
    path = folder / "trie.npz"
    save_trie(trie, "key", path)
    with np.load(path) as file:
        return path, {key: file[key].copy() for key in file.files if key != "allow_pickle"}


def test_bounds_in_a_file_are_not_believed(trie, tmp_path):
    """Neither a bound of its own nor, as a control, fewer masses than there are."""
    path, arrays = saved(trie, tmp_path)
    dead = np.full(arrays["parent"].size, -np.inf)
    np.savez(path, **arrays, log_live=dead)
    assert contents(load_trie(path, "key").root) == contents(trie.root)
    assert trie.root.log_live > -np.inf
    np.savez(path, **{**arrays, "log_rest": np.where(np.isnan(arrays["log_rest"]), np.nan, dead)})
    assert load_trie(path, "key").root.log_live < trie.root.log_live


def _npy(value):
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


def _npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text",
        b"PK\x03\x04",
        pickle.dumps({"header": 1}),
        _npy(np.zeros(3)),
        _npy(np.array(5)),
        _npz(),
        _npz(other=np.zeros(3)),
        _npz(header=np.zeros(3)),
    ],
)
def test_files_of_other_kinds_are_refused(data, tmp_path):
    path = tmp_path / "trie.npz"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="not a saved trie"):
        load_trie(path, "key")
    with pytest.raises(ValueError, match="not a saved trie"):
        load_trie(tmp_path, "key")  # a folder


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("[]", "not a saved trie"),
        ("null", "not a saved trie"),
        ("5", "not a saved trie"),
        ('"text"', "not a saved trie"),
        ("{", "not a saved trie"),
        ("{}", "not a saved trie"),
        ("[" * 100_000, "not a saved trie"),
        ('{"format": 1, "key": "key", "max_nodes": 50}', "format 1"),
        ('{"format": [2], "key": "key", "max_nodes": 50}', "format"),
        ('{"format": 2, "key": ["key"], "max_nodes": 50}', "saved for key"),
        ('{"format": 2, "key": "key", "max_nodes": "50"}', "max_nodes='50'"),
        ('{"format": 2, "key": "key", "max_nodes": null}', "max_nodes"),
        ('{"format": 2, "key": "key", "max_nodes": true}', "max_nodes"),
        ('{"format": 2, "key": "key", "max_nodes": 1e999}', "max_nodes"),
        ('{"format": 2, "key": "key", "max_nodes": 0}', "max_nodes=0"),
    ],
)
def test_bad_headers_are_refused(trie, tmp_path, header, message):
    path, arrays = saved(trie, tmp_path)
    np.savez(path, **{**arrays, "header": np.frombuffer(header.encode(), dtype=np.uint8)})
    with pytest.raises(ValueError, match=message):
        load_trie(path, "key")


@pytest.mark.parametrize(
    "change",
    [
        {"token": np.zeros(3, dtype=np.int64)},
        {"token": np.zeros((2, 2), dtype=np.int64)},
        {"parent": np.array(-1)},
        {"parent": np.zeros(0, dtype=np.int64)},
        {"log_edge": np.array(["a"])},
        {"log_rest": np.zeros(3, dtype=complex)},
    ],
)
def test_arrays_of_other_shapes_and_types_are_refused(trie, tmp_path, change):
    path, arrays = saved(trie, tmp_path)
    np.savez(path, **{**arrays, **change})
    with pytest.raises(ValueError, match="arrays of"):
        load_trie(path, "key")


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_files_raise_nothing_else(trie, tmp_path, data):
    """And what still loads is what was saved."""
    path = tmp_path / "trie.npz"
    save_trie(trie, "key", path)
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] ^= data.draw(st.integers(1, 255))
    del damaged[data.draw(st.integers(0, len(damaged))) or len(damaged) :]
    path.write_bytes(bytes(damaged))
    try:
        loaded = load_trie(path, "key")
    except ValueError:
        return
    assert contents(loaded.root) == contents(trie.root)


def test_more_nodes_than_the_bound_or_repeated_prefixes_are_refused(trie, tmp_path):
    path = tmp_path / "trie.npz"
    save_trie(trie, "key", path)
    with np.load(path) as file:
        arrays = {key: file[key].copy() for key in file.files}
    header = json.loads(arrays["header"].tobytes())
    small = json.dumps({**header, "max_nodes": 3}).encode()
    np.savez(path, **{**arrays, "header": np.frombuffer(small, dtype=np.uint8)})
    with pytest.raises(ValueError, match="its own bound is 3"):
        load_trie(path, "key")
    children = np.flatnonzero(arrays["parent"] == 0)
    assert children.size == 2
    arrays["token"][children] = 1
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match="repeats a prefix"):
        load_trie(path, "key")


def test_key_depends_on_everything():
    base = ("model", [1, 2], "constraint", SamplingLaw(), 10)
    others = [
        ("other", [1, 2], "constraint", SamplingLaw(), 10),
        ("model", [1, 2, 3], "constraint", SamplingLaw(), 10),
        ("model", [1, 2], "other", SamplingLaw(), 10),
        ("model", [1, 2], "constraint", SamplingLaw(0.7), 10),
        ("model", [1, 2], "constraint", SamplingLaw(top_k=3), 10),
        ("model", [1, 2], "constraint", SamplingLaw(top_p=0.9), 10),
        ("model", [1, 2], "constraint", SamplingLaw(), 11),
    ]
    keys = {trie_key(*arguments) for arguments in [base, *others]}
    assert len(keys) == len(others) + 1
    assert trie_key(*base) == trie_key(*base)


def grow(trie, nodes):
    node = trie.root
    for _ in range(nodes):
        node = trie.observe(node, np.log([0.5, 0.5]), 1)


def test_store_forgets_the_least_recently_used():
    store = TrieStore(max_nodes=30, max_nodes_per_trie=12)
    for key in "ab":
        grow(store.get(key), 10)
    first = store.get("a")
    grow(store.get("c"), 10)
    store.get("d")
    assert "a" in store
    assert "b" not in store
    assert store.get("a") is first
    assert list(store)[-1] is first
    assert store.num_nodes <= 30
    with pytest.raises(ValueError, match="max_nodes=0"):
        TrieStore(0)
