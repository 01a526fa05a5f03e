# SPDX-License-Identifier: Apache-2.0
"""Hysteresis on a simulated machine whose latencies are noisy and near break-even."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from proposers import CostModel, DySpecOptions, TokenTree, TreeDrafter
from proposers.gate import CHECK_EVERY, DOUBT, OPEN_AT, PROBE_EVERY, RARELY, SELDOM, Gate

VOCAB = 50
ACCEPTED = 0.5


def simulate(table_source, row_cost: float, steps: int, gate: Gate | None, seed: int) -> dict:
    """Decode on a machine where a node costs `row_cost` steps and is accepted every second time."""
    rng = np.random.default_rng(seed)
    truth = [(1, 1.0), (2, 1.0 + row_cost), (3, 1.0 + 2 * row_cost)]
    cost = CostModel([(r, s * rng.uniform(0.95, 1.05)) for r, s in truth])
    drafter = TreeDrafter(
        VOCAB,
        DySpecOptions(max_nodes=1),
        cost,
        [table_source({1: {2: 1.0}}, odds=ACCEPTED / (1 - ACCEPTED))],
        gate=gate,
    )
    drafter.start("r", [1], greedy=True)
    drafting, seconds, tokens, calls = [], 0.0, 0, 0
    for _ in range(steps):
        (tree,) = drafter.propose(["r"])
        took = float(np.interp(1 + len(tree), *zip(*truth, strict=True)))
        hit = rng.random() < ACCEPTED
        emitted = ([2] if hit else [3]) if not len(tree) or not hit else [2, 5]
        cost.record(1 + len(tree), took * rng.uniform(0.9, 1.1))
        drafter.extend("r", emitted)
        drafter.start("r", [1], greedy=True)
        drafting.append(len(tree) > 0)
        seconds += took
        tokens += len(emitted)
        calls += len(tree) > 0
    flips = sum(a != b for a, b in pairwise(drafting))
    return {"flips": flips, "rate": tokens / seconds, "share": sum(drafting) / steps}


class Unchecked(Gate):
    """Leaves no draft out for the sake of a measurement."""

    def wants_draft(self, base_rows: int, measured: float | None = None) -> bool:
        return super().wants_draft(base_rows)


def test_it_does_not_oscillate_near_break_even(table_source) -> None:
    """A row costs what it brings: without the gate the decision flips with the noise."""
    free = sum(
        simulate(table_source, ACCEPTED * 0.98, 1500, None, seed)["flips"] for seed in range(6)
    )
    gated = sum(
        simulate(table_source, ACCEPTED * 0.98, 1500, Unchecked(), seed)["flips"]
        for seed in range(6)
    )
    assert free > 100  # control: the simulation does tempt it
    assert gated < 0.8 * free
    assert gated < 0.015 * 6 * 1500


def test_it_never_costs_where_drafts_do_not_pay(table_source) -> None:
    for seed in range(4):
        result = simulate(table_source, 0.8, 1500, Gate(), seed)
        assert result["rate"] > 0.98
        assert result["share"] < 0.1


def test_it_drafts_where_drafts_pay(table_source) -> None:
    for seed in range(4):
        result = simulate(table_source, 0.1, 600, Gate(), seed)
        assert result["rate"] > 1.25
        assert result["share"] > 0.95


def test_thresholds_and_probes() -> None:
    gate = Gate()
    assert gate.wants_draft(1)
    steps = 0
    while gate.decide(0.0, 1):
        steps += 1
    assert 20 < steps < 100  # some steps without a promise do not close it
    waits = [gate.wants_draft(1) for _ in range(PROBE_EVERY)]
    assert waits == [False] * (PROBE_EVERY - 1) + [True]
    assert not gate.decide(0.01, 1)  # between the thresholds it stays as it is
    assert not gate.wants_draft(1)
    assert gate.wants_draft(4)  # another batch is another question
    assert not gate.decide(0.01, 4)
    assert gate.decide(0.5, 1)
    for _ in range(200):
        assert gate.decide(0.01, 1)  # and so it does when open
    assert gate.switches == 2


def test_a_large_batch_is_promised_more_before_it_drafts() -> None:
    small, large = 0.5 * DOUBT, 1.5 * DOUBT + OPEN_AT
    for rows, gain, drafts in ((1, small, True), (16, small, False), (16, large, True)):
        gate = Gate()
        for _ in range(200):
            gate.decide(gain, rows)
        assert gate.is_open == drafts, (rows, gain)


def pauses(gate: Gate, trials: int, rows: int = 4) -> list[int]:
    """Steps between trials that fail."""
    found = []
    for _ in range(trials):
        waited = 1
        while not gate.wants_draft(rows):
            waited += 1
        found.append(waited)
        assert not gate.decide(0.0, rows)
    return found


def test_dear_trials_become_rare() -> None:
    gate = Gate(patience=RARELY)
    while gate.decide(0.0, 4):
        pass
    assert pauses(gate, 6) == [8, 16, 32, 64, 64, 64]
    assert pauses(gate, 3, rows=40) == [1, 8, 16]  # another batch is another question
    assert gate.wants_draft(4)
    while not gate.decide(0.5, 4):
        pass
    while gate.decide(0.0, 4):
        pass
    assert pauses(gate, 2) == [8, 16]  # it has paid in between
    cheap = Gate()
    while cheap.decide(0.0, 4):
        pass
    assert pauses(cheap, 4) == [PROBE_EVERY, SELDOM, SELDOM, SELDOM]


def test_an_open_gate_leaves_drafts_out_while_plain_steps_are_unknown() -> None:
    def left_out(measured: float | None, steps: int = 1024) -> int:
        gate = Gate()
        return sum(not gate.wants_draft(4, measured) for _ in range(steps))

    assert left_out(None) == 0
    assert left_out(0.0) == 1024 // CHECK_EVERY
    counts = [left_out(measured) for measured in (0.0, 3.0, 6.0, 12.0, 30.0, 1e9)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 4  # of 1024: it never stops altogether


def test_a_closed_gate_asks_no_source(table_source) -> None:
    gate = Gate()
    source = table_source({1: {2: 1.0}})
    drafter = TreeDrafter(
        VOCAB, DySpecOptions(), CostModel([(1, 1.0), (2, 9.0)]), [source], gate=gate
    )
    drafter.start("r", [1], greedy=True)
    while gate.is_open:
        drafter.propose(["r"])
    asked: list[int] = []
    original = source.candidates
    source.candidates = lambda state: (asked.append(state), original(state))[1]
    for _ in range(PROBE_EVERY - 1):
        assert drafter.propose(["r"]) == [TokenTree.EMPTY]
    assert asked == []
    drafter.propose(["r"])
    assert asked != []
    assert gate.switches == 1


def test_steps_with_prompts_have_a_gate_of_their_own(table_source) -> None:
    """A prompt that comes and goes is no reason to try again what has not paid."""
    gate = Gate()
    # Twelve rows are as dear as they are many; beside a hundred of a prompt they are not.
    cost = CostModel([(1, 1.0), (13, 13.0), (99, 99.0), (101, 99.0), (200, 99.0)])
    drafter = TreeDrafter(
        VOCAB, DySpecOptions(), cost, [table_source({1: {2: 1.0}}, odds=0.5)], gate=gate
    )
    drafter.start("r", [1], greedy=True)
    for _ in range(200):
        drafter.propose(["r"])
    assert not gate.is_open
    drafted = {0: 0, 99: 0}
    for step in range(100):
        other = 99 if step % 2 else 0
        drafted[other] += len(drafter.propose(["r"], other_rows=other)[0]) > 0
        assert not gate.is_open
    assert drafted[0] == 0
    assert drafted[99] > 25


def test_requests_that_want_no_draft_do_not_close_it(table_source) -> None:
    gate = Gate()
    drafter = TreeDrafter(
        VOCAB, DySpecOptions(), CostModel([(1, 1.0), (99, 1.0)]),
        [table_source({1: {2: 1.0}})], gate=gate,
    )  # fmt: skip
    drafter.start("r", [1], greedy=True)
    for _ in range(200):
        assert drafter.propose(["r"], max_nodes=[0]) == [TokenTree.EMPTY]
    assert gate.is_open
    assert len(drafter.propose(["r"])[0]) == 1
