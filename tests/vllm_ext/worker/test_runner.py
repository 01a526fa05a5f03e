# SPDX-License-Identifier: Apache-2.0
"""The parts of the tree runner that speak with our processors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from logits_processors.vllm_v1 import V1Processor
from proposers.tree import TokenTree
from tests.vllm_ext.logs import logged
from vllm_ext.worker import calibration
from vllm_ext.worker.runner import TreeRunnerMixin


class Other:
    """Somebody else's processor."""

    def __init__(self) -> None:
        self.updates: list[Any] = []

    def update_state(self, change: Any) -> None:
        self.updates.append(change)


def ours(keep: Any = None) -> Any:
    processor = object.__new__(V1Processor)
    processor.idle = ()
    processor._rows = {}
    processor.asked = []

    def viable(row: int, tokens: Any, parents: Any) -> Any:
        processor.asked.append((row, tokens))
        return keep(tokens) if keep and row == 1 else None

    processor.viable = viable
    return processor


def runner(*processors: Any, requests: int = 3) -> Any:
    batch = SimpleNamespace(logitsprocs=SimpleNamespace(all=list(processors)), num_reqs=requests)
    return SimpleNamespace(input_batch=batch)


def test_rows_that_do_not_draw_are_idle_while_walking() -> None:
    one, other = ours(), Other()
    engine = runner(one, other)
    with TreeRunnerMixin._processors_walking(engine):
        TreeRunnerMixin._update_processors(engine, [0, 2])
        assert set(one.idle) == {1}
        TreeRunnerMixin._update_processors(engine, [2])
        assert set(one.idle) == {0, 1}
    assert not one.idle
    assert other.updates == [None, None]


def test_an_error_in_the_walk_wakes_all_rows() -> None:
    one = ours()
    engine = runner(one)

    def broken_walk() -> None:
        with TreeRunnerMixin._processors_walking(engine):
            TreeRunnerMixin._update_processors(engine, [])
            raise RuntimeError("in the sampler")

    with pytest.raises(RuntimeError, match="sampler"):
        broken_walk()
    assert not one.idle


def test_forbidden_nodes_are_pruned_with_what_hangs_on_them() -> None:
    def no_sevens(tokens: Any) -> list[bool]:
        return [token != 7 for token in tokens]

    tree = TokenTree((5, 7, 6), (-1, -1, 0), (0.5, 0.4, 0.3))
    trees = {"a": tree, "b": tree, "c": TokenTree.EMPTY}
    processor = ours(no_sevens)
    TreeRunnerMixin._prune_forbidden(runner(Other(), processor), trees, ["a", "b", "c", "d"])
    assert trees["a"] is tree
    assert trees["b"] == TokenTree((5, 6), (-1, 0), (0.5, 0.3))
    assert [row for row, _ in processor.asked] == [0, 1]


def test_each_processor_sees_what_the_others_left() -> None:
    first = ours(lambda tokens: [token != 5 for token in tokens])
    second = ours(lambda tokens: [token != 7 for token in tokens])
    trees = {"b": TokenTree((5, 7, 8), (-1, -1, -1), (0.5, 0.4, 0.1))}
    TreeRunnerMixin._prune_forbidden(runner(first, second), trees, ["a", "b"])
    assert trees["b"].tokens == (8,)
    assert second.asked == [(1, (7, 8))]


def drafting_runner(fails: Callable[[int], bool]) -> Any:
    """A runner whose n-th attempt to draft fails where `fails` says so."""
    counts = {"attempts": 0, "drafting_errors": 0.0}

    def draft(*_: Any) -> dict[str, TokenTree]:
        counts["attempts"] += 1
        if fails(counts["attempts"]):
            raise RuntimeError("in the grower")
        return {"a": TokenTree.EMPTY}

    def add(name: str, amount: float) -> None:
        counts[name] += amount

    made = SimpleNamespace(
        counts=counts,
        _failures=0.0,
        _draft=draft,
        _counters=SimpleNamespace(add=add),
        _timer=SimpleNamespace(exclude=lambda seconds: None),
        draft_model_seconds=lambda: 0.0,
        drop_failed_draft_model=lambda: None,
        _new_drafting=lambda: "new",
    )
    made._drop_drafting = partial(TreeRunnerMixin._drop_drafting, made)
    return made


@pytest.mark.parametrize("every", [1, 3])
def test_drafting_that_keeps_failing_stays_off(every: int) -> None:
    engine = drafting_runner(lambda attempt: attempt % every == 0)
    with logged(logging.ERROR) as lines:
        drafted = [TreeRunnerMixin._try_to_draft(engine) for _ in range(200)]
    assert engine.counts["drafting_errors"] == pytest.approx(8, abs=1)
    assert engine.counts["attempts"] < 30
    assert drafted[-1] == {}
    assert sum("stays off" in line for line in lines) == 1


def test_rare_failures_are_forgiven() -> None:
    engine = drafting_runner(lambda attempt: attempt % 150 == 0)
    drafted = [TreeRunnerMixin._try_to_draft(engine) for _ in range(3001)]
    assert engine.counts == {"attempts": 3001, "drafting_errors": 20}
    assert drafted[-1]


class _Stock:
    """Stands in for vLLM's runner."""

    removed: list[str]

    def _on_request_state_removed(self, req_id: str, req_state: Any) -> None:
        self.removed.append(req_id)


class _Removing(TreeRunnerMixin, _Stock):
    def __init__(self, drafting: Any, rest: Any) -> None:
        self.removed = []
        vars(self).update(vars(rest), _drafting=drafting)
        del self._drop_drafting  # the class has it


def test_what_a_request_said_last_cannot_take_the_engine_down() -> None:
    def fail(request: str) -> None:
        raise RuntimeError(f"in a table, at {request}")

    engine = _Removing(SimpleNamespace(stop=fail), drafting_runner(lambda attempt: False))
    with logged(logging.ERROR) as lines:
        engine._on_request_state_removed("a", None)
    assert engine.removed == ["a"]
    assert engine.counts["drafting_errors"] == 1
    assert engine._drafting == "new"
    assert any("its state is dropped" in line for line in lines)


class Measured(TreeRunnerMixin):
    """A runner whose dummy passes take a known time each."""

    max_num_tokens = 512
    lora_config: Any = object()  # then no logits are asked for

    def __init__(self, seconds_per_row: float, requests: int, monkeypatch: Any) -> None:
        self.seconds_per_row = seconds_per_row
        self.max_num_reqs, self.num_spec_tokens = requests, 31
        self.passes: list[int] = []
        self.now = 0.0
        monkeypatch.setattr(calibration.time, "perf_counter", lambda: self.now)
        one = SimpleNamespace(world_size=1)
        monkeypatch.setattr(calibration, "get_tp_group", lambda: one)

    def _dummy_run(self, rows: int) -> tuple[Any, None]:
        self.passes.append(rows)
        self.now += self.seconds_per_row * rows
        return None, None

    def _sync_device(self) -> None:
        pass


def test_start_up_measures_large_batches_where_there_can_be_some(monkeypatch: Any) -> None:
    counts = (1, 8, 64, 128, 256, 1024)
    for requests, largest in ((1, 8), (2, 64), (64, 256)):
        made = Measured(0.0001, requests, monkeypatch)
        assert made.measure_forward(counts) == [
            (rows, pytest.approx(0.0001 * rows)) for rows in counts if rows <= largest
        ]
        assert made.passes == [rows for rows in counts if rows <= largest] * 5


def test_a_slow_machine_measures_less_of_what_takes_long(monkeypatch: Any) -> None:
    made = Measured(0.02, 64, monkeypatch)
    measured = dict(made.measure_forward((1, 8, 64, 128, 256)))
    assert [made.passes.count(rows) for rows in (1, 8, 64, 128, 256)] == [5, 3, 2, 0, 0]
    assert list(measured) == [1, 8, 64]


def test_start_up_compiles_what_reads_candidates(monkeypatch: Any) -> None:
    """Numba compiles for seconds; the first request must not wait for it."""
    made = Measured(0.0001, 64, monkeypatch)
    made.lora_config = None
    made._dummy_run = lambda rows: (torch.zeros(rows, 4), None)
    made.model = SimpleNamespace(compute_logits=lambda hidden: hidden.new_zeros(len(hidden), 7))
    read: list[Any] = []
    monkeypatch.setattr(calibration, "candidates", lambda logits: read.append(logits.shape))
    made.measure_forward((2, 8))
    assert read == [(2, 7)]


def test_ranks_measure_the_same_passes(monkeypatch: Any) -> None:
    """A pass needs all ranks; a rank with a slower clock must not leave one out."""
    made = Measured(5.0, 64, monkeypatch)
    said: list[bool] = []
    group = SimpleNamespace(
        world_size=2, broadcast_object=lambda here, src: (said.append(here), True)[1]
    )
    monkeypatch.setattr(calibration, "get_tp_group", lambda: group)
    made.measure_forward((1, 2, 4))
    assert made.passes == [1, 2, 4] * 5
    assert not all(said)
