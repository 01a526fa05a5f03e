# SPDX-License-Identifier: Apache-2.0
"""Decisions on a simulated machine whose latencies are noisy: what they lose, what they gain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from proposers import CostModel, DySpecOptions, TokenTree, TreeDrafter
from proposers.gate import Gate
from proposers.grower import Draftee, cut

DEPTH = 6
ANCHORS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
NOISE, PRIOR_NOISE = 0.1, 0.05
STEPS, SEEDS = 800, 4


@dataclass(frozen=True)
class Machine:
    """A batch whose drafted tokens are accepted with a probability.

    Attributes:
        batch: its requests.
        row: seconds of each row after the first one, which takes 1.
        accepted: the probability, known to the drafter.
    """

    batch: int
    row: float
    accepted: float

    @classmethod
    def where_a_node_earns(cls, share: float, batch: int, accepted: float) -> Machine:
        """Where the first node brings `share` of what it costs."""
        return cls(batch, accepted / (share * batch - accepted * (batch - 1)), accepted)

    def seconds(self, rows: int) -> float:
        return 1.0 + self.row * (rows - 1)

    def tokens(self, length: int) -> float:
        """Expected, of a request with a chain of this length."""
        return sum(self.accepted**level for level in range(length + 1))

    def rate(self, lengths: Sequence[int]) -> float:
        """Expected tokens per second of a step with these chains."""
        return sum(map(self.tokens, lengths)) / self.seconds(sum(lengths) + len(lengths))

    def best_fixed(self) -> float:
        return max(self.rate([length] * self.batch) for length in range(DEPTH + 1))


class Chains:
    """Grows what may be accepted on a machine."""

    sources = ()
    spent = 0.0

    def __init__(self, machine: Machine) -> None:
        probs = [machine.accepted**level for level in range(1, DEPTH + 1)]
        self._tree = TokenTree.chain(list(range(DEPTH)), probs)

    def grow(self, draftees: Sequence[Draftee], cost, *, base_rows, base_tokens, most):
        trees = [self._tree] * len(draftees)
        return cut(
            trees, cost, base_rows=base_rows, base_tokens=base_tokens, most=DEPTH * len(trees)
        )

    def stop(self, request: str) -> None:
        pass


def relative_rate(
    machine: Machine, seed: int, gate: Gate | None = None, *, plain_looks: float = 1.0
) -> float:
    """Tokens per second compared with never drafting, each step at its true expectation.

    At the start the plain step looks `plain_looks` times as long as it is.
    """
    rng = np.random.default_rng(seed)
    prior = [
        (rows, machine.seconds(rows) * float(np.exp(rng.normal(0, PRIOR_NOISE))))
        for rows in ANCHORS
    ]
    prior = [(rows, s * plain_looks if rows <= machine.batch else s) for rows, s in prior]
    gate = gate or Gate()
    drafter = TreeDrafter(
        9, DySpecOptions(max_nodes=DEPTH), CostModel(prior), grower=Chains(machine), gate=gate
    )
    names = [str(i) for i in range(machine.batch)]
    for name in names:
        drafter.start(name, [0], greedy=True)
    tokens = seconds = 0.0
    for _ in range(STEPS):
        lengths = [len(tree) for tree in drafter.propose(names)]
        rows = sum(lengths) + len(lengths)
        taken = machine.seconds(rows)
        drafter.cost.record(rows, taken * float(np.exp(rng.normal(0, NOISE))))
        tokens += machine.rate(lengths) * taken
        seconds += taken
    return tokens / seconds / machine.rate([0] * machine.batch)


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize(("accepted", "share"), [(0.05, 0.5), (0.2, 0.9)])
def test_drafts_that_do_not_pay_cost_less_than_two_percent(
    batch: int, accepted: float, share: float
) -> None:
    machine = Machine.where_a_node_earns(share, batch, accepted)
    assert machine.best_fixed() == machine.rate([0] * batch)
    rates = [relative_rate(machine, seed) for seed in range(SEEDS)]
    assert np.mean(rates) > 0.99
    assert min(rates) > 0.98


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize(("accepted", "share"), [(0.3, 2.0), (0.8, 1.3), (0.8, 6.0)])
def test_drafts_that_pay_reach_nearly_the_best_fixed_size(
    batch: int, accepted: float, share: float
) -> None:
    machine = Machine.where_a_node_earns(share, batch, accepted)
    best = machine.best_fixed() / machine.rate([0] * batch)
    assert best > 1.05
    assert np.mean([relative_rate(machine, seed) for seed in range(SEEDS)]) > 0.95 * best


class NeverChecks(Gate):
    """A gate that leaves no draft out for the sake of a measurement."""

    def wants_draft(self, base_rows: int, measured: float | None = None) -> bool:
        return super().wants_draft(base_rows)


def test_a_plain_step_that_was_believed_too_slow_is_found_out() -> None:
    machine = Machine.where_a_node_earns(0.6, 1, 0.1)

    def rates(gate: type[Gate]) -> list[float]:
        return [relative_rate(machine, seed, gate(), plain_looks=1.15) for seed in range(SEEDS)]

    assert np.mean(rates(Gate)) > 0.98
    assert np.mean(rates(NeverChecks)) < 0.96  # control
