# SPDX-License-Identifier: Apache-2.0
"""Sources of other people: what is refused when they register, and what fells them later."""

from __future__ import annotations

import importlib
import logging
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from proposers import CostModel, DySpecOptions, Mixture, TreeDrafter
from proposers.guard import MAX_CANDIDATES, BadSourceError, GuardedSource, checked_answer
from proposers.registry import RegistrationError, Registry, SourceContext, installed, load

VOCAB = 50
FREE = CostModel([(1, 0.03), (1000, 0.03)], margin=0.0)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "not .bucket, dict."),
        ((1, [3]), "not .bucket, dict."),
        ((1.0, {}), "bucket 1.0"),
        ((-1, {}), "bucket -1"),
        ((1, {"a": 0.5}), "token id 'a'"),
        ((1, {VOCAB: 0.5}), "token id 50; ints from 0 to 49"),
        ((1, {-1: 0.5}), "token id -1"),
        ((1, {True: 0.5}), "token id True"),
        ((1, {3: 0.0}), "probability 0.0"),
        ((1, {3: float("nan")}), "probability nan"),
        ((1, {3: 1}), "probability 1;"),
        ((1, {3: 0.8, 4: 0.8}), "sum to 1.600"),
        ((1, dict.fromkeys(range(MAX_CANDIDATES + 1), 0.001)), "65 candidates; at most 64"),
    ],
)
def test_nonsense_answers(answer: Any, message: str) -> None:
    with pytest.raises(BadSourceError, match=message):
        checked_answer(answer, 10**6 if "65" in message else VOCAB)


def test_a_proper_answer_passes() -> None:
    assert checked_answer((2, {3: 0.7, 4: 0.3}), VOCAB) == (2, {3: 0.7, 4: 0.3})


def failing(table_source: Any, method: str, value: Any) -> Any:
    """A source whose `method` raises `value`, or returns it, from its second call on."""
    source, calls = table_source({t: {(t + 1) % 40: 0.9} for t in range(40)}), [0]
    original = getattr(source, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] < 2:
            return original(*args, **kwargs)
        if isinstance(value, Exception):
            raise value
        return value

    setattr(source, method, call)
    return source


@pytest.mark.parametrize(
    ("method", "value"),
    [
        ("candidates", RuntimeError("broken")),
        ("candidates", (1, {VOCAB + 7: 0.9})),
        ("candidates", (1, dict.fromkeys(range(49), 0.01) | {49: 2.0})),
        ("candidates", "text"),
        ("advance", KeyError("x")),
        ("root", ValueError("y")),
        ("extend", IndexError("z")),
        ("prior", float("nan")),
        ("prior", "many"),
    ],
)
def test_a_failing_source_is_out_and_the_others_go_on(
    table_source: Any, caplog: pytest.LogCaptureFixture, method: str, value: Any
) -> None:
    bad = GuardedSource("theirs", failing(table_source, method, value), VOCAB)
    good = table_source({t: {(t + 2) % 40: 0.9} for t in range(40)})
    drafter = TreeDrafter(VOCAB, DySpecOptions(max_nodes=4), FREE, [bad, good])
    with caplog.at_level(logging.ERROR, "vllm.vllm_ext"):
        for name in "abcd":
            drafter.start(name, [1], greedy=name < "c")
            for token in (2, 3, 5):
                (tree,) = drafter.propose([name])
                tree.validate()
                assert all(0 <= t < VOCAB for t in tree.tokens)
                drafter.extend(name, [token])
    assert bad.disabled
    assert len(drafter.propose(["a"])[0]) > 0
    lines = [record.message for record in caplog.records]
    assert len(lines) == 1
    assert "'theirs' is disabled" in lines[0]


def test_a_good_source_is_not_disabled(table_source: Any) -> None:
    """Negative control of the test above."""
    source = GuardedSource("fine", table_source({1: {2: 0.9}}), VOCAB)
    drafter = TreeDrafter(VOCAB, DySpecOptions(), FREE, [source])
    drafter.start("a", [1], greedy=True)
    assert drafter.propose(["a"])[0].tokens == (2,)
    assert not source.disabled


def test_a_source_that_has_failed_is_not_tried_again(
    table_source: Any, caplog: pytest.LogCaptureFixture
) -> None:
    failed: set[str] = set()
    with caplog.at_level(logging.ERROR, "vllm.vllm_ext"):
        for _ in range(3):  # drafters that are built anew
            broken = failing(table_source, "root", ValueError("y"))
            source = GuardedSource("theirs", broken, None, failed)
            drafter = TreeDrafter(VOCAB, DySpecOptions(), FREE, [source])
            drafter.start("a", [1], greedy=True)
            for _ in range(3):
                drafter.propose(["a"])
    assert failed == {"theirs"}
    assert len(caplog.records) == 1


def test_a_source_that_goes_in_circles_is_cut_at_the_limits(table_source: Any) -> None:
    source = GuardedSource("loop", table_source({1: {1: 1.0}}), VOCAB)
    drafter = TreeDrafter(VOCAB, DySpecOptions(max_nodes=9, max_depth=5), FREE, [source])
    drafter.start("a", [1], greedy=True)
    assert len(drafter.propose(["a"])[0]) == 5
    assert not source.disabled


# -- registration --------------------------------------------------------------------------------


def test_a_conforming_source_is_registered(table_source: Any) -> None:
    registry = Registry({"suffix": None})
    registry.register("mine", lambda context: table_source({1: {2: 0.5}}))
    assert registry.names == ["mine"]
    made = registry.make("mine", SourceContext(VOCAB))
    mixture = Mixture([made])
    made.start("a", [1], greedy=True)
    assert set(mixture.predict(mixture.root("a"), True).probs) == {2}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("suffix", "the name is taken"),
        ("mine", "the name is taken"),
        ("Mine", "a name has up to 32"),
        ("", "a name has up to 32"),
        ("x" * 33, "a name has up to 32"),
    ],
)
def test_names_are_checked(table_source: Any, name: str, message: str) -> None:
    registry = Registry({"suffix": None})
    registry.register("mine", lambda context: table_source({}))
    with pytest.raises(RegistrationError, match=message):
        registry.register(name, lambda context: table_source({}))


class Lacking:
    """Has not one method of the protocol."""


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda context: Lacking(), "AttributeError"),
        (lambda: None, "TypeError"),
        (None, "TypeError"),
        (lambda context: (_ for _ in ()).throw(RuntimeError("no")), "RuntimeError: no"),
    ],
)
def test_what_is_no_source_is_refused(factory: Any, message: str) -> None:
    with pytest.raises(RegistrationError, match=message):
        Registry().register("mine", factory)


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("candidates", (1, {99: 0.5}), "token id 99; ints from 0 to 31"),
        ("prior", -1.0, "finite and >= 0"),
        ("advance", ZeroDivisionError("w"), "ZeroDivisionError: w"),
    ],
)
def test_a_source_is_tried_when_it_registers(
    table_source: Any, method: str, value: Any, message: str
) -> None:
    registry = Registry()
    with pytest.raises(RegistrationError, match=message):
        registry.register("mine", lambda context: failing(table_source, method, value))
    assert registry.names == []


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(name: str, value: str) -> EntryPoint:
        return EntryPoint(name, value, "vllm_ext.sources")

    good = entry("mine", "tests.proposers.conftest:TableSource")
    found = [good, good]
    monkeypatch.setattr("proposers.registry.entry_points", lambda group: found)
    assert installed() == {"mine": good}  # one package may be listed twice
    found.append(entry("mine", "another.package:Source"))
    with pytest.raises(RegistrationError, match=r"another.package:Source both claim the name"):
        installed()
    with pytest.raises(RegistrationError, match=r"no.such.module:Source cannot be imported"):
        load(Registry(), entry("gone", "no.such.module:Source"))
    assert importlib.import_module("proposers.registry").GROUP == "vllm_ext.sources"
