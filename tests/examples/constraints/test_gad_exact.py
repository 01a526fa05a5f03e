# SPDX-License-Identifier: Apache-2.0
import math
from typing import Any

import numpy as np
import pytest

gad_exact = pytest.importorskip("gad_exact")

SHARES = {(i,): 0.5**i for i in range(1, 8)}
MASS = 1e-3


def run(seed: int, count: int, power: float = 1.0) -> dict[str, Any]:
    """Draws from the law, or from a flatter one."""
    weights = np.array(list(SHARES.values())) ** power
    picked = np.random.default_rng(seed).choice(len(SHARES), size=count, p=weights / weights.sum())
    programs = [list(SHARES)[i] for i in picked]
    return {
        "attempts": count,
        "draws": [
            {
                "tokens": list(p),
                "log_prob": math.log(MASS * SHARES[p]),
                "log_weight": 0.0,
                "state": "complete",
            }
            for p in programs
        ],
    }


def judge(power: float) -> dict[str, Any]:
    total = MASS * sum(SHARES.values())
    return {
        str(seed): gad_exact.judge(run(seed, 200, power), run(99, 50, 0.0), math.log(total))
        for seed in range(4)
    }


def test_an_exact_sampler_passes_and_its_control_fails() -> None:
    results = judge(1.0)
    overall = gad_exact.combined(results)
    assert overall["inside"] > 0.01
    assert overall["outside"] > 0.01
    assert all(found["control"]["p"] < 1e-3 for found in results.values())
    for found in results.values():
        assert found["outside"]["low"] <= found["outside"]["high"]
        assert found["inside"]["n"] + found["outside"]["count"] == 100
    assert "| 0 | 200 | 200 |" in gad_exact.report(results)


def test_a_flatter_law_is_noticed() -> None:
    assert gad_exact.combined(judge(0.6))["inside"] < 1e-3


def test_too_many_or_too_few_outside_are_noticed() -> None:
    assert gad_exact.fit_outside(5, 100, 0.03, 0.06) > 0.5
    assert gad_exact.fit_outside(20, 100, 0.03, 0.06) < 1e-4
    assert gad_exact.fit_outside(0, 100, 0.1, 0.2) < 1e-3


def test_exact_draws_are_above_the_floor_of_a_law_that_was_found_by_them() -> None:
    log_probs = {(i,): math.log(0.9 if i == 0 else 0.1 / 500) for i in range(501)}
    bias = gad_exact.measure_bias(log_probs, set())
    assert bias["low"] > 0.0
    everything = gad_exact.measure_bias(log_probs, set(log_probs))
    assert everything["mean"] == pytest.approx(0.0, abs=0.1 * bias["mean"])
