# SPDX-License-Identifier: Apache-2.0
import json
import math
from pathlib import Path
from typing import Any

import pytest

gad = pytest.importorskip("gad")

A, B, C = (1,), (2,), (3,)
LAW = {A: math.log(0.5), B: math.log(0.25), C: math.log(0.25)}


def test_probabilities_are_normalised_in_the_log() -> None:
    law = gad.normalised({A: -1000.0, B: -1000.0 + math.log(3.0)})
    assert law[A] == pytest.approx(math.log(0.25))
    assert law[B] == pytest.approx(math.log(0.75))


def test_divergence_of_an_empirical_law() -> None:
    assert gad.divergence([A, B, A, C], LAW) == pytest.approx(0.0)
    assert gad.divergence([A, A], LAW) == pytest.approx(math.log(2.0))
    assert gad.divergence([B, B, A, A], LAW) == pytest.approx(0.5 * math.log(2.0))


def test_the_floor_is_what_exact_draws_have() -> None:
    # The mean divergence of n exact draws over k cells is about (k - 1) / 2n.
    found = gad.floor(LAW, 1000)
    assert found["mean"] == pytest.approx(1e-3, rel=0.2)
    assert found["low"] < found["mean"] < found["high"]
    assert gad.floor({A: 0.0}, 10)["mean"] == 0.0


def test_weights_shift_a_mean() -> None:
    assert gad.weighted_mean([1.0, 3.0], [-800.0, -800.0]) == pytest.approx(2.0)
    assert gad.weighted_mean([1.0, 3.0], [-800.0, -800.0 + math.log(3.0)]) == pytest.approx(2.5)


def drawn(*programs: tuple[int, ...], failed: int = 0) -> dict[str, Any]:
    draws = [
        {"tokens": list(p), "log_prob": LAW[p] - 1.0, "log_weight": -1.0, "state": "complete"}
        for p in programs
    ]
    draws += [
        {"tokens": [9], "log_prob": -0.1, "log_weight": -math.inf, "state": "incomplete"}
    ] * failed
    return {"draws": draws, "attempts": len(draws) + 2, "forwards": 30, "seconds": 1.0}


def test_methods_are_measured_against_all_programs_found() -> None:
    runs = {"masking": drawn(A, A, A, failed=1), "cars": drawn(A, B, A, C)}
    found = gad.measure(runs)
    assert found["programs"] == 3
    assert found["found_mass"] == pytest.approx(math.exp(-1.0))
    masking, cars = found["methods"]["masking"], found["methods"]["cars"]
    assert masking["complete"] == 3
    assert masking["drawn"] == 4
    assert masking["forwards_per_program"] == 10.0
    assert masking["divergence"] == pytest.approx(math.log(2.0))
    assert cars["divergence"] == pytest.approx(0.0)
    expected = 0.5 * math.log(0.5) + 0.5 * math.log(0.25) - 1.0
    assert found["expected_log_likelihood"] == pytest.approx(expected)
    assert cars["log_likelihood"]["mean"] == pytest.approx(expected)
    assert masking["log_likelihood"]["mean"] > expected
    assert gad.means({"task": found}) == {}  # three programs are no law
    runs = {"masking": drawn(*[A] * 12), "cars": drawn(*[A, B, A, C] * 3)}
    overall = gad.means({"few": found, "task": gad.measure(runs)})
    assert overall["cars"]["divergence"]["n"] == 1
    assert overall["masking"]["log_likelihood_minus_expected"]["mean"] > 0.1
    assert overall["cars"]["log_likelihood_minus_expected"]["mean"] == pytest.approx(0.0)
    assert "| task | cars | 4/4 | 3 |" in gad.report({"task": found})


def test_a_method_that_drew_nothing_stays_in_the_report(tmp_path: Path) -> None:
    found = {"task": gad.measure({"masking": drawn(A), "cars": drawn()})}
    assert "| task | cars | 0/0 | - |" in gad.report(found)
    assert gad.means(found) == {}
    assert gad.means_table(gad.means(found))
    gad.plot(found, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 0


def test_tasks_alternate_between_splits_shortest_first() -> None:
    rows = [
        {"id": f"{split}{size}", "split": split, "tok_smollm2": size}
        for split, size in (("S", 5), ("S", 3), ("S", 4), ("B", 9))
    ]
    assert [row["id"] for row in gad.choose(rows, 3)] == ["B9", "S3", "S4"]


def test_a_result_is_reported_again(tmp_path: Path) -> None:
    gad_report = pytest.importorskip("gad_report")
    settings = {"samples": 12, "max_attempts": 20, "max_tokens": 8, "batch": 4}
    environment = {
        "model": "m",
        "cores": 1,
        "cpu": "c",
        "memory_gib": 1,
        "gpu": [],
        "load_average": [0.5],
        "python": "3",
        "versions": {"numpy": "2"},
        "command": ["gad.py"],
        "date": "today",
        "git_commit": "abc",
    }
    runs = {method: drawn(*[A, B, A, C] * 3) for method in gad.METHODS}
    result = {
        "environment": environment,
        "settings": settings,
        "means": {},
        "tasks": {"task": gad.measure(runs)},
    }
    path = tmp_path / "gad.json"
    path.write_text(json.dumps(result), encoding="utf-8")
    gad_report.main(path)
    again = json.loads(path.read_text(encoding="utf-8"))
    assert again["means"]["cars"]["divergence"]["n"] == 1
    assert again["environment"] == environment
    assert "commit abc" in path.with_suffix(".md").read_text(encoding="utf-8")
