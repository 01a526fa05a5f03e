# SPDX-License-Identifier: Apache-2.0
"""The stores of an engine, without an engine."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from toy_model import EOS, GRAMMAR, TINY, ToyModel

from logits_processors import sessions as module
from logits_processors.constraint import ConstraintError
from logits_processors.limits import Bounds
from logits_processors.request import parse_request
from logits_processors.session import ConstraintSession, MirostatSession, MomentumSession
from logits_processors.sessions import Asked, Sessions

MODEL = ToyModel(12)


def asked(name: str | None = "a", method: str = "awrs", seed: int | None = 1, **keys: Any) -> Asked:
    extra = {"constraint_ebnf": GRAMMAR, "constraint_method": method} | keys
    request = parse_request(extra | ({} if name is None else {"constraint_id": name}))
    assert request is not None
    return Asked(request, 1.0, 0, 1.0, seed, 10, (0, 1))


def store(bounds: Bounds | None = None, nonce: str = "n") -> Sessions:
    return Sessions(lambda: TINY, TINY.eos_ids, "toy", nonce, bounds=bounds)


def finish(session: Any, text: list[int], steps: int = 20) -> list[int]:
    """Take a session to the end of its text."""
    for _ in range(steps):
        edit = session.choose(MODEL.logits(text))
        text = [*text, edit.token]
        session.follow(text)
        if edit.token == EOS:
            return text
    return text


def test_nothing_piles_up_over_ten_thousand_requests() -> None:
    bounds = Bounds(records=50, parked=20, compiled=3, trie_nodes=100)
    sessions = store(bounds)
    for i in range(10_000):
        method = "asap" if i % 10 == 0 else "masking"
        grammar = f'root ::= "{i // 1000}" | [01]+'
        session = sessions.open(asked(f"id {i}", method, constraint_ebnf=grammar), [])
        if i % 10 == 0:
            token = session.choose(MODEL.logits([])).token
            session.follow([token])
            if i % 20 == 0:
                session.fail("stopped")
        sessions.close(session)
        assert sessions.num_held <= 70
        assert len(sessions._compiled) <= 3
    assert not sessions._running
    assert sessions.tries.num_nodes < 200


def test_a_preempted_session_is_found_by_its_text() -> None:
    sessions = store()
    first, second = sessions.open(asked(), []), sessions.open(asked(), [])
    first.follow([0])
    second.follow([1])
    sessions.close(first)
    sessions.close(second)
    assert sessions.open(asked("b"), [1]) not in (first, second)
    assert sessions.open(replace(asked(), prompt=(0,)), [1]) not in (first, second)
    assert sessions.open(asked(), [1]) is second
    assert sessions.open(asked(), [1]) is not second
    assert sessions.open(asked(), [0]) is first


def test_a_new_request_takes_nobodys_session() -> None:
    sessions = store()
    first = sessions.open(asked(), [])
    first.follow([0])
    sessions.close(first)
    assert sessions.open(asked(), []) is not first


@pytest.mark.parametrize(
    ("name", "seed", "shared"), [("a", None, True), (None, 1, True), (None, None, False)]
)
def test_a_longer_text_is_continued_only_where_it_is_no_twins(
    name: str | None, seed: int | None, shared: bool
) -> None:
    """An engine may drop its last tokens; but unseeded twins must not draw the same noise."""
    sessions = store()
    session = sessions.open(asked(name, seed=seed), [])
    session.follow([0, 0, 0])
    sessions.close(session)
    assert (sessions.open(asked(name, seed=seed), [0, 0]) is session) is shared


def test_the_right_length_goes_first() -> None:
    sessions = store()
    long, exact = sessions.open(asked(), []), sessions.open(asked(), [])
    long.follow([0, 0])
    exact.follow([0])
    sessions.close(long)
    sessions.close(exact)
    assert sessions.open(asked(), [0]) is exact
    assert sessions.open(asked(), [0]) is long


def test_noise_is_the_requests_own() -> None:
    def text(sessions: Sessions, **keys: Any) -> list[int]:
        return finish(sessions.open(asked(None, **keys), []), [])

    sessions = store()
    assert text(sessions, seed=3) == text(sessions, seed=3)
    keyed = [text(sessions, seed=None, constraint_seed=i) for i in range(8)]
    assert keyed == [text(sessions, seed=i, constraint_seed=i % 8) for i in range(8)]
    assert len(set(map(tuple, keyed))) > 1
    fresh = [text(sessions, seed=None) for _ in range(8)]
    again, other = store(), store(nonce="other")
    assert fresh == [text(again, seed=None) for _ in range(8)]
    assert fresh != [text(other, seed=None) for _ in range(8)]
    assert len(set(map(tuple, fresh))) > 1


def test_a_prefix_in_the_prompt() -> None:
    sessions = store()
    request = replace(asked(constraint_prefix=2), prompt=(2, 1, 0))
    session = sessions.open(request, [])
    assert isinstance(session, ConstraintSession)
    text = finish(session, [])
    assert len(text) == 4  # of six tokens two were there
    record = session.record()
    assert (record.state, record.token_ids) == ("complete", text)
    for bad, problem in ((4, "the prompt has only 3 tokens"), (3, "violates the constraint")):
        session = sessions.open(replace(asked(constraint_prefix=bad), prompt=(2, 1, 0)), [])
        with pytest.raises(ValueError, match=problem):
            session.choose(MODEL.logits([]))


def test_a_prompt_of_embeddings() -> None:
    sessions = store()
    session = sessions.open(replace(asked(), prompt=None), [])
    with pytest.raises(ConstraintError, match="embeddings"):
        session.choose(MODEL.logits([]))


def test_a_failed_compilation_ends_in_a_record() -> None:
    sessions = store()
    session = sessions.open(asked(constraint_ebnf="root ::= ("), [])
    with pytest.raises(ConstraintError) as refusal:
        session.choose(MODEL.logits([]))
    session.fail(str(refusal.value))
    assert session.choose(MODEL.logits([])).token == EOS
    sessions.close(session)
    assert [r.state for r in sessions.pop(["a"])] == ["error"]
    assert sessions.pop(["a"]) == []


def test_a_record_is_out_once_wherever_its_request_is() -> None:
    sessions = store()
    running, parked, done = (sessions.open(asked(), []) for _ in range(3))
    parked.follow([0])
    sessions.close(parked)
    finish(done, [])
    sessions.close(done)
    finish(running, [])
    assert sorted(r.state for r in sessions.pop(["a", "other"])) == [
        "complete", "complete", "incomplete",
    ]  # fmt: skip
    assert sessions.pop(["a"]) == []
    assert sessions.open(asked(), [0]) is parked  # asked about while preempted, it still goes on
    sessions.close(running)
    finish(parked, [0])
    sessions.close(parked)
    assert sessions.pop(["a"]) == []


def test_an_evicted_session_leaves_its_record() -> None:
    sessions = store(Bounds(parked=1))
    for name in "abc":
        session = sessions.open(asked(name), [])
        session.follow([0])
        sessions.close(session)
    assert len(sessions._parked) == 1
    assert [r.id for r in sessions.pop(["a"])] == ["a"]
    assert [r.id for r in sessions.pop(["b", "c"])] == ["b", "c"]


def test_the_small_processors() -> None:
    sessions = store()
    for keys, kind in (
        ({"mirostat_version": 2}, MirostatSession),
        ({"momentum_alpha": 0.2}, MomentumSession),
    ):
        request = parse_request(keys)
        assert request is not None
        for prompt in ((0, 1), None):
            session = sessions.open(replace(asked(), request=request, prompt=prompt), [])
            assert isinstance(session, kind)
            session.choose(MODEL.logits([]))
            session.follow([1])
            session.follow([1, 0])
            session.follow([1])
            session.choose(MODEL.logits([1]))
            sessions.close(session)
    assert sessions.pop([""]) == []


def test_mirostat_learns_from_what_was_emitted() -> None:
    request = parse_request({"mirostat_version": 2, "mirostat_tau": 1.0})
    assert request is not None
    session = store().open(replace(asked(), request=request), [])
    assert isinstance(session, MirostatSession)
    logits = np.array([3.0, 0.0, 0.0, 0.0])
    session.choose(logits)
    session.choose(logits)  # thrown away
    caps = list(session._caps)
    session.follow([1])
    assert session._caps[: len(caps)] == caps
    assert session._caps[-1] != caps[-1]
    session.follow([])
    assert session._caps == caps


def test_errors_fit_any_wire() -> None:
    session = store().open(asked(), [])
    session.fail("\ud800" + "x" * 10**6)
    assert len(session.error.encode()) < 10_000


def test_the_vocabulary_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    sessions = Sessions(lambda: reads.append(1) or TINY, TINY.eos_ids, "toy", "n")  # type: ignore[func-returns-value]
    for grammar in (GRAMMAR, "root ::= [01]+"):
        finish(sessions.open(asked(constraint_ebnf=grammar), []), [])
    assert reads == [1]
    compiled: list[Any] = []
    monkeypatch.setattr(module, "compile_constraint", lambda *given: compiled.append(given))
    sessions.open(asked(), [])
    sessions._compiler.submit(lambda: None).result()
    assert compiled == []  # one compilation serves all


def test_replayed_weights_are_unknown() -> None:
    session = store().open(asked(), [0, 0])
    assert isinstance(session, ConstraintSession)
    finish(session, [])
    session = store().open(asked(), [0, 0])
    assert isinstance(session, ConstraintSession)
    session.follow([0, 0])
    text = finish(session, [0, 0])
    record = session.record()
    assert record.token_ids[2:] == text[2:]
    assert [math.isnan(weight) for weight in record.log_weights] == [True, True] + [False] * 4


@pytest.mark.parametrize(("longest", "stops"), [(3, ()), (10, (1,))])
def test_what_is_drawn_beyond_the_end_of_a_text_is_no_part_of_it(
    longest: int, stops: tuple[int, ...]
) -> None:
    """Speculation draws on; the engine then drops it, and the record must not have it."""
    sessions = store()
    request = asked(constraint_ebnf="root ::= [01]{9}")
    session = sessions.open(replace(request, max_tokens=longest), [])
    session.stops = stops
    text: list[int] = []
    for wanted in (0, 0, 1, 1, 0, 1):
        text.append(session.choose(np.where(np.arange(TINY.size) == wanted, 9.0, -9.0)).token)
        session.follow(text)
    sessions.close(session)
    [record] = sessions.pop(["a"])
    assert (record.token_ids, len(record.log_weights)) == ([0, 0, 1], 3)
    assert record.state == "incomplete"
