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
    assert all(found["control"]["inside"]["p"] < 1e-3 for found in results.values())
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


def test_the_control_is_noticed_outside() -> None:
    cars = run(0, 200, 3.0)  # names the two or three most probable programs
    found = gad_exact.judge(cars, run(99, 50, 0.0), math.log(MASS))
    assert found["control"]["outside"]["count"] > 10
    assert found["control"]["outside"]["p"] < 1e-3


def test_rare_programs_lift_the_measure_but_not_among_named_ones() -> None:
    shares = np.array([0.97] + [0.03 / 3000] * 3000)
    picked = np.random.default_rng(0).choice(shares.size, size=1000, p=shares)
    drawn = [((int(i),), math.log(shares[i])) for i in picked]
    above = gad_exact.by_blocks(drawn, {})
    assert len(above["found"]) == len(above["named"]) == 10
    assert np.mean(above["found"]) > 0.03
    assert gad_exact.by_blocks(drawn[:100], {})["named"] == []  # nobody else names anything
    assert abs(np.mean(above["named"])) < 0.01


def test_a_bias_stays_among_named_programs() -> None:
    flat = run(0, 400, 0.3)
    above = gad_exact.by_blocks(gad_exact.whole(flat), {})
    assert np.mean(above["named"]) > 0.1
