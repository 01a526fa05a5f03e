# SPDX-License-Identifier: Apache-2.0
"""What the timer of steps records."""

from __future__ import annotations

import time

import pytest

from proposers.cost_model import AttentionCost
from vllm_ext.worker.latency import StepTimer


class Recorded(list):
    """Stands in for the cost model."""

    def record(self, rows: int, seconds: float, **load: float) -> None:
        self.append((rows, load))


def timer() -> StepTimer:
    made = StepTimer()
    made.start([(1, 0.03), (8, 0.04)], AttentionCost(1e-6, 1e-6), adaptive=True)
    made.cost = Recorded()  # type: ignore[assignment]
    return made


def test_a_step_is_recorded_with_what_it_attended_to() -> None:
    clock = timer()
    clock.begin(5)
    clock.attend([100, 200], [3, 0], 1)
    clock.work_outside(0.003, sampling=0.001)
    clock.work_outside(0.005)
    clock.exclude(0.002)
    clock.end()
    clock.begin(2)
    clock.attend([110, 201], [0, 0], 0)
    clock.end()
    clock.begin(1)
    first = {"context": 300, "drafted": 300, "verified": 5, "branching": 1}
    plain = {"context": 311, "drafted": 0, "verified": 2, "branching": 0}
    assert clock.cost == [
        (5, {**first, "outside": pytest.approx(0.006), "sampling": 0.001}),
        (2, {**plain, "outside": 0.0, "sampling": 0.0}),
    ]


def test_pauses_and_unfinished_steps_are_not_recorded() -> None:
    clock = timer()
    clock.begin(5)
    clock.attend([100], [4], 1)
    clock.work_outside(1.0, sampling=1.0)
    clock.begin(1)  # the step before has not ended
    clock.end()
    time.sleep(0.06)
    clock.begin(1)  # the engine was idle
    clock.end()
    clock.begin(1)
    # And nothing was left behind.
    assert clock.cost == [(1, {"outside": 0.0, "sampling": 0.0})]


@pytest.mark.parametrize("adaptive", [True, False])
def test_a_context_costs_something_only_where_trees_are_sized_by_cost(adaptive: bool) -> None:
    clock = StepTimer()
    clock.start([(1, 0.03), (8, 0.04)], AttentionCost(1e-6, 1e-6), adaptive=adaptive)
    short, long = (clock.cost.in_context(1, [n]).seconds(8) for n in (10, 10_000))
    assert (long > 1.5 * short) == adaptive
    clock.cost.record(8, 9.0, context=1.0, drafted=1.0)
    assert ((clock.cost.seconds(8) > 0.04) and adaptive) or clock.cost.seconds(8) == 1.0
