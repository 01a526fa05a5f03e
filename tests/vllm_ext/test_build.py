# SPDX-License-Identifier: Apache-2.0
"""From options to drafters: every method drafts, and what cannot be used is refused or left out."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from proposers import CostModel, TokenTree, VerifiedRows
from proposers.datastore import DatastoreError
from proposers.guard import GuardedSource
from proposers.hydra import HydraError, HydraHead
from proposers.prime import PrimeError, PrimeTable
from proposers.registry import RegistrationError
from vllm_ext.build import BUILT_IN, build_drafter, check_resources, load_resources
from vllm_ext.head import HEADS
from vllm_ext.identity import IdentityError, model_hash, tokenizer_hash
from vllm_ext.methods import METHODS, OptionError, parse_options
from vllm_ext.model_files import identity_of
from vllm_ext.prime import TABLES

VOCAB = 300
HIDDEN = 4
PLUGIN = Path(__file__).parents[2] / "examples" / "source_plugin"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder that looks like a model, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    return SimpleNamespace(
        model=str(folder),
        revision=None,
        get_vocab_size=lambda: VOCAB,
        get_hidden_size=lambda: HIDDEN,
    )


@pytest.fixture
def store(tmp_path: Path, model: Any) -> Path:
    pytest.importorskip("pydivsufsort", reason="building needs vllm-ext[datastore]")
    from proposers.datastore_build import build

    (tmp_path / "a.txt").write_text("the cat sat on the mat")
    build(
        [tmp_path / "a.txt"],
        tmp_path / "store",
        encode=lambda texts: [[ord(c) for c in text] for text in texts],
        tokenizer=tokenizer_hash(Path(model.model)),
        vocab_size=VOCAB,
    )
    return tmp_path / "store"


def table() -> PrimeTable:
    return PrimeTable(
        np.array([ord("t")], np.int32),
        np.array([[ord("h")]], np.int32),
        np.array([[0.9]], np.float32),
    )


def drafter(model: Any, method: str, /, **given: Any) -> Any:
    options = parse_options(METHODS[method], {"adaptive": False, **given})
    check_resources(options, model, None)
    resources = load_resources(options, model, None)
    return build_drafter(method, options, resources, CostModel([(1, 1.0), (999, 1.0)]))


def text(string: str) -> list[int]:
    return [ord(c) for c in string]


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"self_draft"}))  # built as dyspec
def test_every_method_drafts_a_repetition_or_what_was_seen(
    model: Any, store: Path, method: str
) -> None:
    required: dict[str, dict[str, Any]] = {
        "datastore": {"datastore": str(store)},
        "pearl": {"model": "none here", "sources": ["suffix", "bigram"]},
    }
    given = required.get(method, {})
    made = drafter(model, method, **given)
    made.start("r", text("the dog, the cat, the d"), greedy=True)
    rows = VerifiedRows(
        np.array([text("ed"), text("he")], np.int64),
        np.array([text("oa"), text(" n")], np.int64),
        np.array([[0.9, 0.05], [0.9, 0.05]], np.float32),
        np.zeros(2, np.int64),
    )
    for token in text("og, the"):
        made.observe(rows)
        (tree,) = made.propose(["r"])
        tree.validate()
        made.extend("r", [token])
    (tree,) = made.propose(["r"])
    assert tree.tokens[0] == ord(" ")
    made.stop("r")


def nodes_drafted(model: Any, store: Path, method: str, /, **given: Any) -> int:
    """Nodes of one step for twenty requests that repeat themselves."""
    required: dict[str, dict[str, Any]] = {
        "datastore": {"datastore": str(store)},
        "pearl": {"model": "none here", "sources": ["suffix"]},
    }
    made = drafter(model, method, **{**required.get(method, {}), **given})
    names = [str(i) for i in range(20)]
    for name in names:
        made.start(name, text("the cat sat on the mat, the cat"), greedy=True)
    rows = VerifiedRows(
        np.array([text("at"), text("t ")], np.int64),
        np.array([text(" ,"), text("so")], np.int64),
        np.array([[0.9, 0.05], [0.9, 0.05]], np.float32),
        np.zeros(2, np.int64),
    )
    made.observe(rows)
    return sum(map(len, made.propose(names)))


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"self_draft"}))
def test_nodes_per_step_are_limited_by_an_option(model: Any, store: Path, method: str) -> None:
    assert nodes_drafted(model, store, method, max_batch_nodes=7) == 7
    assert nodes_drafted(model, store, method, max_batch_nodes=4096) > 7


def test_the_default_limit_can_be_raised(model: Any, store: Path) -> None:
    assert nodes_drafted(model, store, "dyspec") == 128
    assert nodes_drafted(model, store, "dyspec", max_batch_nodes=4096) > 128


def test_without_its_model_and_without_sources_nothing_is_drafted(model: Any) -> None:
    """A draft model that has failed leaves this behind."""
    made = drafter(model, "pearl", model="failed")
    made.start("r", text("the dog, the cat, the d"), greedy=True)
    made.extend("r", text("og, the"))
    assert made.propose(["r"]) == [TokenTree.EMPTY]


def test_what_the_user_named_is_checked_before_the_engine_starts(
    model: Any, store: Path, tmp_path: Path
) -> None:
    cases: list[tuple[dict[str, Any], type[ValueError], str]] = [
        ({"sources": ["suffix", "nobody"]}, OptionError, "unknown source 'nobody'; there are suff"),
        ({"datastore": str(tmp_path / "absent")}, DatastoreError, "cannot be read"),
        ({"prime": str(tmp_path / "absent")}, PrimeError, "cannot be read"),
        ({"head": str(tmp_path / "absent")}, HydraError, "cannot be read"),
    ]
    for given, error, message in cases:
        with pytest.raises(error, match=message):
            drafter(model, "dyspec", **given)
    drafter(model, "dyspec", sources=list(BUILT_IN), datastore=str(store), prime="off")
    (Path(model.model) / "tokenizer.json").write_text("{ }")
    with pytest.raises(DatastoreError, match="another tokenizer"):
        drafter(model, "dyspec", datastore=str(store))


def first_draft(model: Any, **given: Any) -> tuple[int, ...]:
    made = drafter(model, "dyspec", **given)
    made.start("r", text("xt"), greedy=True)
    return made.propose(["r"])[0].tokens


def test_a_primed_table_is_found_in_the_cache(model: Any) -> None:
    assert first_draft(model) == ()
    identity = identity_of(Path(model.model))
    table().save(TABLES.path(identity), identity)
    assert first_draft(model) == (ord("h"),)
    assert first_draft(model, prime="off") == ()
    (Path(model.model) / "model.safetensors").write_bytes(b"others!")
    assert first_draft(model) == ()  # other weights, another table


def test_a_broken_table_in_the_cache_costs_one_warning(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = TABLES.path(identity_of(Path(model.model)))
    path.parent.mkdir(parents=True)
    path.write_bytes(b"nonsense" * 9)
    with caplog.at_level(logging.INFO, "vllm.vllm_ext"):
        assert first_draft(model) == ()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "unprimed" in caplog.text
    with pytest.raises(PrimeError):
        first_draft(model, prime=str(path))  # named by the user: refused


def test_a_foreign_table_is_refused_when_named(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    table().save(path, {"model": "other", "tokenizer": "other"})
    with pytest.raises(PrimeError, match="made for model 'other'"):
        first_draft(model, prime=str(path))


def test_a_model_that_is_not_here_is_not_primed(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    absent = SimpleNamespace(**{**vars(model), "model": "nobody/nothing-at-all"})
    assert first_draft(absent) == ()
    assert caplog.records == []
    with pytest.raises(IdentityError, match="neither a folder nor"):
        first_draft(absent, prime="/some/file")


def head_saying(token: int) -> HydraHead:
    """A head that expects `token`, whatever it sees."""
    return HydraHead(
        tokens=torch.tensor([ord("t"), token]),
        inner=torch.zeros(3, HIDDEN),
        inputs=torch.zeros(VOCAB, 3),
        outer=torch.zeros(HIDDEN, 3),
        scale=torch.ones(HIDDEN),
        gain=torch.ones(HIDDEN),
        outputs=torch.zeros(3, HIDDEN),
        bias=torch.tensor([0.0, 9.0, 0.0]),
    )


def watching(made: Any) -> tuple[int, ...]:
    made.start("r", text("at"), greedy=True)
    made.see(["r"], torch.ones(1, HIDDEN))
    return made.propose(["r"])[0].tokens[:1]


def test_a_head_is_found_in_the_cache_and_sees_states(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert not drafter(model, "dyspec").watches
    identity = identity_of(Path(model.model))
    path = HEADS.path(identity)
    head_saying(ord("e")).save(path, identity)
    made = drafter(model, "dyspec")
    assert made.watches
    assert watching(made) == (ord("e"),)
    assert watching(drafter(model, "dyspec", head="off")) == ()
    assert watching(drafter(model, "dyspec", head=str(path))) == (ord("e"),)
    path.write_bytes(b"nonsense" * 9)
    caplog.clear()
    with caplog.at_level(logging.INFO, "vllm.vllm_ext"):
        assert watching(drafter(model, "dyspec")) == ()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "without a head" in caplog.text
    with pytest.raises(HydraError, match="draft head"):
        drafter(model, "dyspec", head=str(path))


def test_a_head_that_fails_is_disabled(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    identity = identity_of(Path(model.model))
    head_saying(ord("e")).save(HEADS.path(identity), identity)
    made = drafter(model, "dyspec")
    made.start("r", text("at"), greedy=True)
    made.see(["r"], torch.ones(1, HIDDEN + 1))  # states of another model
    assert made.propose(["r"])[0].tokens == ()
    assert not made.watches
    assert "source 'head' is disabled" in caplog.text


def test_hashes_depend_on_content_alone(tmp_path: Path) -> None:
    def folder(name: str, weights: bytes) -> Path:
        made = tmp_path / name
        made.mkdir()
        (made / "model.safetensors").write_bytes(weights)
        return made

    big = bytes(5_000_000)
    same = [model_hash(folder(name, big)) for name in "ab"]
    assert same[0] == same[1]
    for i, changed in enumerate((big + b"x", b"x" + big[1:], big[:-1] + b"x")):
        assert model_hash(folder(f"c{i}", changed)) != same[0]
    with pytest.raises(IdentityError, match="holds no weights"):
        model_hash(tmp_path)
    with pytest.raises(IdentityError, match="holds no tokenizer"):
        tokenizer_hash(tmp_path / "a")


@pytest.mark.parametrize("method", ["dyspec", "rasd"])
def test_the_trigram_table_keeps_as_many_contexts_as_it_is_told(model: Any, method: str) -> None:
    def remembered(**given: Any) -> int:
        made = drafter(model, method, prime="off", **given)
        rows = VerifiedRows(
            np.array([text("ab"), text("cd"), text("ef")], np.int64),
            np.array([text("xy")] * 3, np.int64),
            np.full((3, 2), 0.4, np.float32),
            np.zeros(3, np.int64),
        )
        made.observe(rows)
        found = 0
        for name in ("zab", "zcd", "zef"):
            made.start(name, text(name), greedy=True)
            (tree,) = made.propose([name])
            found += {ord("x"), ord("y")} <= set(tree.tokens)
        return found

    key = "draft" if method == "rasd" else "sources"
    assert remembered(**{key: ["trigram"]}) == 3
    assert remembered(**{key: ["trigram"], "trigrams": 2}) == 2


FENCED: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("dyspec", {"sources": [name]}) for name in BUILT_IN},
    "datastore": ("dyspec", {"sources": ["suffix"], "datastore": True}),
    "past_outputs": ("dyspec", {"sources": ["suffix"], "past_outputs_mib": 1}),
    "bigram (static tree)": ("token_recycling", {}),
    "store (aded)": ("aded", {}),
    "suffix (rasd)": ("rasd", {}),
    "copy (copy)": ("copy", {}),
}


@pytest.mark.parametrize("name", FENCED)
def test_a_built_in_source_that_fails_is_disabled(
    model: Any, store: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    method, given = FENCED[name]
    given = {key: str(store) if value is True else value for key, value in given.items()}
    options = parse_options(METHODS[method], {"adaptive": False, **given})
    resources = load_resources(options, model, None)
    name = name.split()[0]

    def broken(*_: Any) -> Any:
        raise RuntimeError("the disk is gone")

    with caplog.at_level(logging.ERROR, "vllm.vllm_ext"):
        for _ in range(2):  # a drafter that is built anew, after another failure
            made = build_drafter(method, options, resources, CostModel([(1, 1.0), (999, 1.0)]))
            fences = [source for source in made._sources if isinstance(source, GuardedSource)]
            assert len(fences) == len(made._sources)
            for fence in fences:
                if fence._name == name and not fence.disabled:
                    fence._source.root = broken  # type: ignore[union-attr]
            made.start("r", text("the cat, the c"), greedy=True)
            for token in text("at, the"):
                (tree,) = made.propose(["r"])
                tree.validate()
                made.extend("r", [token])
            assert [f._name for f in fences if f.disabled] == [name]
    assert [record.message for record in caplog.records] == [
        f"vllm-ext: source {name!r} is disabled, it failed with RuntimeError: the disk is gone"
    ]


# -- sources of other packages -------------------------------------------------------------------


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example package, as if it were installed."""
    monkeypatch.syspath_prepend(str(PLUGIN))
    monkeypatch.delitem(sys.modules, "repeat_source", raising=False)
    entry = EntryPoint("repeat", "repeat_source:RepeatSource", "vllm_ext.sources")
    monkeypatch.setattr("proposers.registry.entry_points", lambda group: [entry])


@pytest.mark.usefixtures("plugin")
def test_the_example_source_takes_part(model: Any) -> None:
    made = drafter(model, "dyspec", sources=["repeat"], min_probability=0.001)
    made.start("r", [5, 6], greedy=True)
    assert made.propose(["r"])[0].tokens == (5, 6)
    with pytest.raises(OptionError, match=r"there are suffix, .*, repeat"):
        drafter(model, "dyspec", sources=["repeats"])


def test_a_source_that_does_not_conform_is_refused(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = EntryPoint("odd", "collections:OrderedDict", "vllm_ext.sources")
    monkeypatch.setattr("proposers.registry.entry_points", lambda group: [entry])
    with pytest.raises(RegistrationError, match="source 'odd' breaks the contract"):
        drafter(model, "dyspec", sources=["odd"])
    drafter(model, "dyspec")  # others are not affected


def test_the_example_package_names_what_it_holds() -> None:
    import tomllib

    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["vllm_ext.sources"] == {
        "repeat": "repeat_source:RepeatSource"
    }
