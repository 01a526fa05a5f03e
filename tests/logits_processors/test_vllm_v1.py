# SPDX-License-Identifier: Apache-2.0
"""The V1 adaptor on vLLM's own batch: whatever the schedule, a request gets its own text."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_engine import PLAIN, ToyV1, config, params, toy_tokenizer
from toy_model import EOS, LANGUAGE, spell

from logits_processors import sessions as sessions_module
from logits_processors.compilation import compile_constraint
from logits_processors.constraint import ConstraintRuntimeError
from logits_processors.session import ConstraintSession
from logits_processors.vllm_v1 import V1Processor
from proposers.tree import TokenTree
from tests.vllm_ext.logs import logged

METHODS = ("awrs", "masking", "asap", "cars")
TEXTS = set(map(spell, LANGUAGE))


@pytest.fixture(autouse=True, scope="module")
def tokenizer() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        toy_tokenizer(patch)
        yield


def trie(engine: ToyV1) -> dict[tuple[int, ...], tuple[float, float | None]]:
    """What the engine's only trie knows, by prefix."""
    found = {}
    for kept in engine.processor.batch.sessions.tries._tries.values():
        for node in kept:
            prefix, at = [], node
            while at.parent is not None:
                prefix.insert(0, at.token)
                at = at.parent
            found[tuple(prefix)] = (node.log_live, node.log_rest)
    return found


def straight(method: str, seed: int) -> tuple[list[int], Any, Any]:
    engine = ToyV1()
    engine.add("a", params(method=method, seed=seed))
    engine.run("a")
    [record] = engine.records("a")
    return engine.texts["a"], record, trie(engine)


OPERATIONS = st.lists(
    st.one_of(
        st.sampled_from(["plain", "discard", "preempt", "readd", "swap", "come", "go", "rewind"]),
        st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 3)), min_size=1, max_size=5),
    ),
    max_size=14,
)


def tree_of(guesses: Any) -> TokenTree:
    """A tree from (parent, token) pairs, without repeated siblings."""
    tokens: list[int] = []
    parents: list[int] = []
    for parent, token in guesses:
        parent = min(parent, len(tokens) - 1)
        if (parent, token) not in list(zip(parents, tokens, strict=True)):
            tokens.append(token)
            parents.append(parent)
    return TokenTree(tuple(tokens), tuple(parents), (0.0,) * len(tokens))


def drive(engine: ToyV1, method: str, operations: Any) -> None:
    """Take a request through a schedule, then to its end."""
    neighbours = 0
    for operation in operations:
        if engine.texts["a"][-1:] == [EOS]:
            break
        if operation == "discard":
            engine.step(discarded=["a"])
        elif operation == "preempt":
            engine.step([name for name in engine.requests if name != "a"])
        elif operation == "readd":
            engine.step(moved=["a"])
        elif operation == "swap" and len(engine.requests) > 1:
            engine.step(swaps=[(0, engine.batch.num_reqs - 1)])
        elif operation == "come" and len(engine.requests) < 5:
            neighbours += 1
            engine.add(f"n{neighbours}", PLAIN)
            engine.requests = dict(reversed(engine.requests.items()))
            engine.step()
        elif operation == "go" and len(engine.requests) > 1:
            engine.finish(next(name for name in engine.requests if name != "a"))
            engine.step()
        elif operation == "rewind" and method in ("awrs", "masking"):
            # Texts shrink where the engine drops tokens; tries have learnt from them by then.
            engine.texts["a"] = engine.texts["a"][:-2]
            del engine.requests["a"].output_token_ids[-2:]
            engine.step()
        elif isinstance(operation, list):
            engine.step(trees={"a": tree_of(operation)})
        else:
            engine.step()
    if engine.texts["a"][-1:] == [EOS]:
        engine.finish("a")
        engine.step()
    else:
        engine.run("a")


@pytest.mark.parametrize("method", METHODS)
@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(operations=OPERATIONS, seed=st.integers(0, 5))
def test_no_schedule_changes_a_text(method: str, operations: Any, seed: int) -> None:
    text, record, learnt = straight(method, seed)
    engine = ToyV1()
    engine.add("a", params(method=method, seed=seed))
    drive(engine, method, operations)
    assert engine.texts["a"] == text
    assert engine.records("a") == [record]
    assert trie(engine) == learnt


def test_the_straight_run_is_a_member_with_a_weight_for_each_token() -> None:
    for method in METHODS:
        for seed in range(4):
            text, record, _ = straight(method, seed)
            assert record.token_ids == text
            assert len(record.log_weights) == len(text)
            if record.state == "complete":
                assert tuple(text) in TEXTS
            else:
                assert (method, record.state, text[-1]) == ("cars", "restart", EOS)


def test_plain_types_leave_the_worker() -> None:
    """vLLM's wire format knows no numpy; a reply that holds some takes the engine down."""
    for method in METHODS:
        for estimator in ("recursive", "two_loop", "geometric") if method == "awrs" else (None,):
            engine = ToyV1()
            engine.add("a", params(method=method, constraint_estimator=estimator))
            engine.run("a")
            [fields] = engine.processor.records(["a"])
            assert {type(token) for token in fields["token_ids"]} == {int}
            assert {type(weight) for weight in fields["log_weights"]} == {float}
            assert type(fields["checks"]) is type(fields["mask_fallbacks"]) is int


def hasty(learn: bool) -> Any:
    """A mutation: a step that takes its draw for the emission."""
    choose = ConstraintSession._choose

    def step(self: Any, logits: Any) -> Any:
        edit = choose(self, logits)
        draw, begun = self._draws[-1], self._begun
        if draw.token is None:
            self._conclude(draw)
        elif learn:
            begun.sampler.advance(begun.state, draw.token)
            begun.sampler.rewind(begun.state, 1)
        return edit

    return step


def discarding(max_tokens: int) -> tuple[ToyV1, Any]:
    """An engine at the last token of a text, after it threw a draw away, and what it knew before.

    Texts of the grammar have six tokens; with fewer allowed the last draw is a dead end.
    """
    engine = ToyV1()
    engine.add("a", params(method="asap", max_tokens=max_tokens))
    for _ in range(max_tokens - 1):
        engine.step()
    engine.session("a").follow(engine.texts["a"])
    before = trie(engine)
    engine.step(discarded=["a"])
    engine.session("a").follow(engine.texts["a"])
    return engine, before


@pytest.mark.parametrize(("max_tokens", "learn"), [(6, True), (4, False)])
def test_a_draw_that_is_thrown_away_teaches_nothing(
    max_tokens: int, learn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, before = discarding(max_tokens)
    assert trie(engine) == before
    assert not engine.session("a").over
    monkeypatch.setattr(ConstraintSession, "_choose", hasty(learn))
    engine, before = discarding(max_tokens)
    assert trie(engine) != before


def test_a_text_that_shrinks_is_followed_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = next(seed for seed in range(20) if straight("awrs", seed)[0][0] == 1)
    operations = ["plain"] * 4 + ["rewind", "plain"]

    def faithful() -> bool:
        engine = ToyV1()
        engine.add("a", params(seed=seed))
        drive(engine, "awrs", operations)
        return (engine.texts["a"], engine.records("a")[0]) == straight("awrs", seed)[:2]

    assert faithful()
    follow = ConstraintSession.follow

    def forwards(self: Any, output: Any) -> None:
        if len(output) >= len(self.tokens):
            follow(self, output)

    monkeypatch.setattr(ConstraintSession, "follow", forwards)
    assert not faithful()


def test_requests_that_trade_rows_keep_their_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after ``reset_prefix_cache``: all leave and come back in one step, in another order."""

    def kept() -> bool:
        engine = ToyV1()
        for name in "abc":
            engine.add(name, params(name, seed=None))
        engine.step()
        engine.requests = {name: engine.requests[name] for name in "cba"}
        engine.step(moved=["a", "b", "c"])
        found = engine.records("a", "b", "c")
        assert [sum(r.id == name for r in found) for name in "abc"] == [1, 1, 1]
        return not any(math.isnan(weight) for r in found for weight in r.log_weights)

    assert kept()

    def one_by_one(self: V1Processor, change: Any) -> None:
        for row, given_params, prompt, output in change.added if change else ():
            self._leave(row)
            session = self.batch.open(given_params, prompt, output)
            if session is not None:
                self._rows[row] = (session, output)

    monkeypatch.setattr(V1Processor, "update_state", one_by_one)
    with pytest.raises(AssertionError):
        assert kept()


def test_a_row_that_is_used_again_closes_its_request() -> None:
    engine = ToyV1()
    engine.add("a", params("a"))
    engine.run("a")
    engine.add("b", params("b"))
    engine.add("c", PLAIN)
    for _ in range(6):
        engine.step()
    engine.finish("b")
    engine.add("d", params("d", seed=9))  # takes b's row; nobody is told that b has left
    engine.run("d")
    states = {record.id: record.state for record in engine.records("a", "b", "c", "d")}
    assert states == {"a": "complete", "b": "complete", "d": "complete"}


def test_a_lost_session_is_replayed() -> None:
    """The store of parked sessions is bounded: a text may come back to an engine that forgot it."""
    for method in ("awrs", "masking", "asap"):
        text, record, _ = straight(method, 3)
        engine = ToyV1()
        engine.add("a", params(method=method, seed=3))
        engine.step()
        engine.step()
        engine.enter([])
        engine.processor.batch.sessions._parked.clear()
        engine.run("a")
        assert engine.texts["a"] == text
        [found] = engine.records("a")
        assert [math.isnan(weight) for weight in found.log_weights[:2]] == [True, True]
        assert found.log_weights[2:] == record.log_weights[2:]
        assert found.state == "complete"


def test_cars_begins_anew_where_it_lost_its_bounds() -> None:
    seed = next(seed for seed in range(20) if straight("cars", seed)[1].state == "complete")
    engine = ToyV1()
    engine.add("a", params(method="cars", seed=seed))
    engine.step()
    engine.enter([])
    engine.processor.batch.sessions._parked.clear()
    engine.run("a")
    assert engine.records("a")[0].state == "restart"


def test_twins_without_a_seed_draw_their_own_noise() -> None:
    engine = ToyV1()
    for i in range(8):
        engine.add(str(i), params(None, seed=None))
    engine.run(*map(str, range(8)))
    assert len({tuple(text) for text in engine.texts.values()}) > 1
    # A twin that was stopped half-way must not lend its future to one that comes back.
    engine = ToyV1()
    for name in "ab":
        engine.add(name, params(None, seed=None))
    engine.step()
    engine.texts["b"], engine.requests["b"].output_token_ids[:] = [], []
    engine.texts["b"] += engine.texts["a"]
    engine.requests["b"].output_token_ids += engine.texts["a"]
    engine.session("b").follow(engine.texts["b"])
    first, second = engine.session("a"), engine.session("b")
    engine.step(["a"])
    engine.finish("a")
    engine.enter([])
    engine.enter(["b"])
    assert engine.session("b") is second
    engine.enter([])
    engine.processor.batch.sessions._parked.pop(id(second))
    engine.enter(["b"])
    assert engine.session("b") is not first


def test_ranks_agree_and_engines_do_not() -> None:
    def texts(**options: Any) -> list[list[int]]:
        engine = ToyV1(config(**options))
        for i in range(8):
            engine.add(str(i), params(None, seed=None))
        engine.run(*map(str, range(8)))
        return list(engine.texts.values())

    assert texts() == texts()
    assert texts() != texts(instance_id="another")
    assert texts() != texts(data_parallel_index=1)


def test_children_of_one_request_leave_a_record_each() -> None:
    engine = ToyV1()
    for i in range(3):
        engine.add(str(i), params("shared", seed=i))
    engine.run("0", "1", "2")
    found = engine.records("shared")
    assert sorted(r.token_ids for r in found) == sorted(engine.texts.values())


@pytest.mark.parametrize("method", ["awrs", "masking", "asap", "cars"])
def test_placeholders_are_filled_in(method: str) -> None:
    """Asynchronous engines show -1, even for the last token of a request that leaves."""
    text, record, learnt = straight(method, 2)
    engine = ToyV1(asynchronous=True)
    engine.add("a", params(method=method, seed=2))
    engine.add("b", PLAIN)
    engine.step()
    engine.step(["b"])  # preempted with its last token unread
    engine.run("a")
    assert engine.texts["a"] == text
    assert engine.records("a") == [record]
    assert trie(engine) == learnt


def test_end_of_text_in_a_draft() -> None:
    text, record, _ = straight("awrs", 4)
    engine = ToyV1()
    engine.add("a", params(seed=4))
    beyond = TokenTree.chain([*text, 0, 1], [0.0] * (len(text) + 2))
    assert engine.step(trees={"a": beyond}) == {"a": text}
    engine.finish("a")
    engine.step()
    assert engine.records("a") == [record]


def test_dead_ends_end_the_text() -> None:
    for method in ("asap", "cars"):
        engine = ToyV1()
        engine.add("a", params(method=method, max_tokens=4))
        engine.run("a")
        [record] = engine.records("a")
        assert record.state in ("dead_end", "restart")
        assert engine.texts["a"][-1] == EOS
        assert record.log_weights[-1] == -math.inf
    engine = ToyV1()
    engine.add("a", params(method="awrs", max_tokens=4))
    engine.run("a")
    assert engine.records("a")[0].state == "incomplete"


def test_the_length_of_the_model_bounds_the_text() -> None:
    engine = ToyV1(config(max_model_len=6))
    engine.add("a", params(method="asap", max_tokens=50), prompt=[0, 1])
    for _ in range(4):
        engine.step()
    assert engine.texts["a"][-1] == EOS
    assert engine.session("a").record().state in ("incomplete", "dead_end")


def test_a_token_that_the_constraint_forbids_ends_in_an_error() -> None:
    engine = ToyV1()
    engine.add("a", params())
    engine.step()
    engine.texts["a"][:] = engine.requests["a"].output_token_ids[:] = [2]
    engine.step()
    assert engine.texts["a"] == [2, EOS]
    [record] = engine.records("a")
    assert record.state == "error"
    assert "token 2 was emitted at position 0" in record.error


def failing_after(accepted: int, where: str) -> Any:
    """Constraints that raise once they hold ``accepted`` tokens."""

    def compile_(*arguments: Any) -> Any:
        compiled = compile_constraint(*arguments)
        start = type(compiled).start

        class Failing:
            key, vocabulary = compiled.key, compiled.vocabulary

            def start(self) -> Any:
                constraint = start(compiled)
                real = getattr(constraint, where)

                def raising(*given: Any) -> Any:
                    if constraint.num_accepted >= accepted:
                        raise ConstraintRuntimeError("half a \ud800 pair")
                    return real(*given)

                setattr(constraint, where, raising)
                return constraint

        return Failing()

    return compile_


@pytest.mark.parametrize(("where", "method"), [("allows", "awrs"), ("full_mask", "asap")])
def test_an_error_while_generating_ends_one_request(
    where: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions_module, "compile_constraint", failing_after(2, where))
    engine = ToyV1()
    engine.add("a", params("a", method))
    engine.add("b", PLAIN)
    with logged(logging.ERROR) as lines:
        for _ in range(4):
            engine.step()
    assert engine.texts["a"][2:] == [EOS, EOS]
    assert len(lines) == 1
    assert "half a" in lines[0]
    lines[0].encode()  # or the log could not be written
    [record] = engine.records("a")
    assert record.state == "error"
    assert "half a" in record.error
    record.error.encode()  # or the reply could not be sent


def test_an_error_in_a_guess_leaves_the_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    text, _, _ = straight("awrs", 4)
    monkeypatch.setattr(sessions_module, "compile_constraint", failing_after(3, "accept"))
    engine = ToyV1()
    engine.add("a", params(seed=4))
    engine.step()
    keep = engine.processor.viable(0, [*text[1:5], 2], [-1, 0, 1, 2, -1])
    assert keep == [True, True, False, False, False]
    assert engine.session("a")._begun.state.constraint.num_accepted == 1


def test_pruning_keeps_what_may_be_drawn() -> None:
    engine = ToyV1()
    engine.add("b", PLAIN)
    engine.add("a", params())
    assert engine.processor.viable(0, [0], [-1]) is None
    engine.enter(["a", "b"])
    row = engine.batch.req_id_to_index["a"]
    assert engine.processor.viable(row, [0], [-1]) == [False]  # not begun
    engine.step()
    first = engine.texts["a"][0]
    allowed = [0] if first == 0 else [0, 1]
    tokens, parents = [0, 1, 2, EOS, 0, 2], [-1, -1, -1, -1, 0, 0]
    assert engine.processor.viable(row, tokens, parents) == [
        True, 1 in allowed, False, False, True, False,
    ]  # fmt: skip
    engine.run("a")
    assert engine.processor.viable(row, [0], [-1]) is None


def test_weights_in_the_logits() -> None:
    """With processed logits a token's "logprob" is its log weight, whatever the temperature."""
    for temperature in (0.5, 1.0, 2.0):
        engine = ToyV1(config(logprobs_mode="processed_logits"))
        engine.add("a", params(method="asap", max_tokens=4, temperature=temperature))
        shown = []
        for _ in range(4):
            [token] = engine.step()["a"]
            processed = engine.shown[0] / temperature  # as vLLM's sampler does next
            shown.append(float(processed[token]))
            assert (processed == -math.inf).sum() == 3
            assert torch.isfinite(processed.softmax(0)).all()
        [record] = engine.records("a")
        assert record.log_weights[-1] == -math.inf
        assert shown[-1] < -1e20
        np.testing.assert_allclose(shown[:-1], record.log_weights[:-1], rtol=1e-5, atol=1e-6)


def test_idle_rows_do_not_draw() -> None:
    engine = ToyV1()
    engine.add("a", params())
    engine.enter(["a"])
    engine.processor.idle = {0}
    row = torch.zeros(1, 4)
    assert engine.processor.apply(row.clone()).equal(row)
    engine.processor.idle = ()
    assert not engine.processor.apply(row.clone()).equal(row)


def test_records_are_handed_out_once() -> None:
    engine = ToyV1()
    assert engine.records("a") == []
    engine.add("a", params())
    engine.step()
    [early] = engine.records("a")
    assert (early.state, early.token_ids) == ("incomplete", engine.texts["a"])
    engine.run("a")
    assert engine.records("a") == []
    text = straight("awrs", 1)[0]
    assert engine.texts["a"] == text
    engine.add("b", params("b"))
    engine.step()
    engine.enter([])
    assert engine.records("b")[0].state == "incomplete"  # while it is preempted
    engine.run("b")
    assert engine.texts["b"] == text
    assert engine.records("b") == []


def test_rows_and_stores_do_not_pile_up() -> None:
    bounds = {"records": 20, "parked": 10, "compiled": 2, "trie_nodes": 50}
    engine = ToyV1(config(additional_config={"vllm_ext_constraints": bounds}))
    held = set()
    for i in range(100):
        for j in range(4):
            engine.add(f"{i} {j}", params(f"{i} {j}", "asap", seed=i, max_tokens=3 + j))
        engine.step()
        engine.finish(*list(engine.requests))
        held.add(engine.processor.batch.sessions.num_held)
    engine.step()
    assert max(held) <= 20 + 10 + 4
    assert not engine.processor._rows
    assert engine.records("99 3")


def test_the_adaptor_is_no_argmax_invariant() -> None:
    assert ToyV1().processor.is_argmax_invariant() is False
