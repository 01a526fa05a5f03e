# SPDX-License-Identifier: Apache-2.0
from importlib.metadata import EntryPoint, EntryPoints

import pytest
from toy_model import BYTES

from logits_processors import predicate
from logits_processors.constraint import ConstraintError, ConstraintRuntimeError
from logits_processors.limits import Limits
from logits_processors.predicate import ENTRY_POINT_GROUP, compile_predicate


class Even:
    def __init__(self, argument=""):
        if argument == "odd":
            raise ValueError("odd is not supported")
        self.seen = []

    def prefix(self, text):
        self.seen.append(text)
        if "!" in text:
            raise RuntimeError("boom")
        return len(text) <= 4

    def complete(self, text):
        return len(text) % 2 == 0


class Nothing(Even):
    def prefix(self, text):
        return bool(text)


@pytest.fixture
def registered(monkeypatch):
    module = f"{__name__}:"
    entries = EntryPoints(
        EntryPoint(name, module + value, ENTRY_POINT_GROUP)
        for name, value in [("even", "Even"), ("twice", "Even"), ("twice", "Nothing")]
    )
    monkeypatch.setattr(predicate, "entry_points", lambda group: entries.select(group=group))


@pytest.mark.usefixtures("registered")
def test_found_by_name():
    constraint = compile_predicate("even", BYTES).start()
    assert constraint.complete()
    assert constraint.accept(ord("a"))
    assert not constraint.complete()
    assert not constraint.allows(BYTES.eos_ids[0])


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("name", "message"),
    [("absent", "not registered; registered: even, twice"), ("twice", "more than once")],
)
def test_unknown_and_ambiguous_names_are_refused(name, message):
    with pytest.raises(ConstraintError, match=message):
        compile_predicate(name, BYTES)


def test_no_predicates_at_all():
    with pytest.raises(ConstraintError, match=ENTRY_POINT_GROUP):
        compile_predicate("os:system", BYTES)


def test_arguments_are_data_with_a_bound():
    with pytest.raises(ConstraintError, match="odd is not supported"):
        compile_predicate("even", BYTES, "odd", factory=Even)
    with pytest.raises(ConstraintError, match="max_bytes"):
        compile_predicate("even", BYTES, "x" * 20, Limits(max_bytes=10), factory=Even)


def test_refusing_the_empty_text_is_an_empty_language():
    with pytest.raises(ConstraintError, match="refuses the empty text"):
        compile_predicate("nothing", BYTES, factory=Nothing)


def test_an_exception_is_reported_and_leaves_the_state():
    constraint = compile_predicate("even", BYTES, factory=Even).start()
    assert constraint.accept(ord("a"))
    with pytest.raises(ConstraintRuntimeError, match="'even' raised RuntimeError: boom"):
        constraint.accept(ord("!"))
    assert constraint.num_accepted == 1
    assert constraint.text == "a"


def test_only_whole_characters_are_shown():
    shown = Even()
    constraint = compile_predicate("even", BYTES, factory=lambda argument: shown).start()
    first, second = "é".encode()
    assert constraint.accept(first)
    assert not constraint.complete()
    assert not constraint.allows(first)  # no character continues so
    assert not constraint.allows(ord("a"))
    assert constraint.accept(second)
    assert constraint.text == "é"
    assert set(shown.seen) == {"", "é"}
    constraint.rollback(1)
    assert constraint.accept(second)
