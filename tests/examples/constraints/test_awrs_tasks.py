# SPDX-License-Identifier: Apache-2.0
import math
from pathlib import Path
from typing import Any

import pytest

awrs_tasks = pytest.importorskip("awrs_tasks")

from awrs_judges import Task, Verdict  # noqa: E402  (found once the line above has passed)

from logits_processors.compilation import Spec  # noqa: E402


def answer(right: bool, log_weight: float | None, complete: bool = True) -> dict[str, Any]:
    return {
        "text": "",
        "complete": complete,
        "log_weight": log_weight,
        "valid": right,
        "accurate": right,
        "score": 0.5 if right else None,
    }


def run(*answers: dict[str, Any], tokens: int = 10) -> dict[str, Any]:
    return {
        "seconds": 0.1,
        "tokens": tokens,
        "checks": 40,
        "masks": 5,
        "errors": [],
        "answers": list(answers),
    }


def test_only_finished_answers_can_be_right() -> None:
    task = Task("t", "", Spec("regex", "a"), None, 1, lambda text: Verdict(True, text == "a", 1.0))
    assert awrs_tasks.judged(task, "a", True, -1.5)["accurate"]
    cut = awrs_tasks.judged(task, "a", False, -math.inf)
    assert (cut["valid"], cut["accurate"], cut["log_weight"]) == (False, False, None)


def test_the_best_answer_has_the_largest_weight() -> None:
    drawn = run(answer(False, None), answer(True, -5.0), answer(False, -7.0))
    assert awrs_tasks.best_of(drawn)["answers"] == [answer(True, -5.0)]
    dead = run(answer(False, None), answer(True, None))
    assert len(awrs_tasks.best_of(dead)["answers"]) == 1


def test_a_single_answer_is_scored_by_the_mean_over_draws() -> None:
    found = awrs_tasks.summarise(
        [run(answer(True, 0.0), answer(False, 0.0)), run(answer(True, 0.0), answer(True, 0.0))]
    )
    assert found["accurate"]["mean"] == 0.75
    assert found["accurate"]["n"] == found["tasks"] == 2
    assert found["answers"] == 4
    assert found["checks_per_token"] == 4.0
    assert found["masks_per_token"] == 0.5
    assert found["ms_per_token"]["median"] == pytest.approx(10.0)
    assert found["score"]["n"] == 3


def test_masking_is_compared_on_its_own_tasks_only(tmp_path: Path) -> None:
    right, wrong = run(answer(True, 0.0)), run(answer(False, -1.0))
    entries = {
        "easy": {"masking": wrong, "awrs": right, "smc": right},
        "hard": {"awrs": wrong, "smc": right},
    }
    groups = awrs_tasks.compare(entries)
    assert set(groups["all tasks"]) == {"awrs", "awrs best", "smc"}
    some = groups["tasks that masks can express"]
    assert set(some) == {"masking", "awrs", "awrs best", "smc"}
    assert groups["all tasks"]["awrs"]["accurate"]["mean"] == 0.5
    assert some["awrs"]["accurate"]["mean"] == 1.0
    assert some["masking"]["accurate"]["mean"] == 0.0
    text = awrs_tasks.report({"suite": groups}, 5)
    assert "## suite: all tasks (2)" in text
    assert "AWRS-SMC, 5 particles" in text
    awrs_tasks.plot({"suite": groups}, 5, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 0


def test_a_report_holds_only_tasks_that_every_method_has_taken() -> None:
    spec = Spec("regex", "a")
    tasks = [
        Task(name, "", spec, mask, 1, lambda _: Verdict(True, True))
        for name, mask in (("masked", spec), ("half", spec), ("unmasked", None))
    ]
    keys = ["masked:masking", "masked:awrs", "masked:smc", "half:awrs", "half:smc"]
    keys += ["unmasked:awrs", "unmasked:smc"]
    entries = {f"s:{key}": run(answer(True, 0.0)) for key in keys}
    found = awrs_tasks.finished("s", tasks, entries)
    assert {task: set(runs) for task, runs in found.items()} == {
        "masked": {"masking", "awrs", "smc"},
        "unmasked": {"awrs", "smc"},
    }


def test_draws_are_compared_one_by_one() -> None:
    def texts(*some: str) -> dict[str, Any]:
        return run(*(answer(True, 0.0) | {"text": text} for text in some))

    entries = {
        "both": {"masking": texts("a", "b", "c"), "awrs": texts("a", "x", "c")},
        "alone": {"awrs": texts("z")},
    }
    found = awrs_tasks.agreement(entries)
    assert (found["same"]["hits"], found["same"]["n"]) == (2, 3)
    assert found["different"] == [{"task": "both", "masking": "b", "awrs": "x"}]
    assert '| both | `"b"` | `"x"` |' in awrs_tasks.report_agreement({"suite": found})
    assert awrs_tasks.agreement({"alone": entries["alone"]}) is None
    assert awrs_tasks.report_agreement({}) == ""
