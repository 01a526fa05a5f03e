# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vllm_ext.cli.bench_report import overview_table, plot, summarise, task_table
from vllm_ext.cli.bench_run import Measurement, Plan, run
from vllm_ext.cli.engine_types import GenerateResult
from vllm_ext.cli.prompts import EncodedPrompt

PROMPTS = [EncodedPrompt(i, "even" if i % 2 == 0 else "odd", [i]) for i in range(4)]


def summary(batches: list[int], **engines: Any) -> dict[str, list[dict[str, Any]]]:
    plan = Plan(batches, rounds=2, max_tokens=8, temperature=0.0)
    return summarise(list(run(engines, PROMPTS, [9], plan)))


@pytest.fixture
def ten_tokens(request_of: Any) -> Any:
    return lambda ids, params: request_of(list(range(10)))


@pytest.fixture
def arms(FakeEngine: Any, ten_tokens: Any) -> dict[str, list[dict[str, Any]]]:
    return summary(
        [1, 2],
        none=FakeEngine(ten_tokens, seconds_per_token=0.05),
        # Of 10 tokens 6 were accepted drafts: 4 steps, 12 drafted tokens, 3 a step.
        fast=FakeEngine(
            ten_tokens, seconds_per_token=0.02, drafted=12, accepted=6, drafting_share=0.1
        ),
    )


def test_one_entry_per_batch_size_with_the_documented_keys(
    arms: dict[str, list[dict[str, Any]]],
) -> None:
    assert [e["batch"] for e in arms["fast"]] == [1, 2]
    entry = arms["fast"][0]
    assert entry["tokens_per_s"] == pytest.approx(50.0)
    assert entry["tokens_per_step"] == pytest.approx(10 / 4)
    assert entry["rows_per_step"] == pytest.approx(1 + 12 / 4)
    assert entry["ratio"]["median"] == pytest.approx(2.5)
    assert set(entry["ratio"]) == {"median", "low", "high"}
    assert len(entry["ratio_by_round"]) == entry["rounds"] == 2
    assert entry["requests"] == 8
    assert entry["drafting_share"] == pytest.approx(0.1)
    # 10 tokens in 0.2 s, a tenth of which is drafting, over 4 steps.
    assert entry["drafting_ms_per_step"] == pytest.approx(20 / 4)
    assert entry["ttft_ms"]["median"] == pytest.approx(100.0)
    assert entry["inter_token_ms"]["median"] == pytest.approx(200.0 / 9)
    assert arms["none"][0]["ratio"]["median"] == pytest.approx(1.0)
    assert arms["none"][0]["tokens_per_step"] == arms["none"][0]["rows_per_step"] == 1.0
    assert arms["none"][0]["drafting_share"] is arms["none"][0]["drafting_ms_per_step"] is None
    json.dumps(arms, allow_nan=False)


def test_tasks_are_split_where_a_group_has_one_task(
    arms: dict[str, list[dict[str, Any]]],
) -> None:
    assert set(arms["fast"][0]["tasks"]) == {"even", "odd"}
    assert arms["fast"][0]["tasks"]["odd"]["groups"] == 2
    assert set(arms["fast"][1]["tasks"]) == {"(mixed)"}


def test_different_answers_lower_the_identical_fraction(
    FakeEngine: Any, request_of: Any, ten_tokens: Any
) -> None:
    def wrong_on_prompt_3(ids: list[int], params: dict[str, Any]) -> Any:
        return request_of([0] * 10) if ids == [3] else ten_tokens(ids, params)

    arms = summary([1], none=FakeEngine(ten_tokens), wrong=FakeEngine(wrong_on_prompt_3))
    assert arms["wrong"][0]["identical_to_none"] == pytest.approx(3 / 4)
    assert arms["none"][0]["identical_to_none"] == 1.0


def test_arms_are_compared_with_each_other_group_by_group(FakeEngine: Any, ten_tokens: Any) -> None:
    arms = summary(
        [1],
        none=FakeEngine(ten_tokens, seconds_per_token=0.04),
        slow=FakeEngine(ten_tokens, seconds_per_token=0.05),
        fast=FakeEngine(ten_tokens, seconds_per_token=0.02),
    )
    assert arms["fast"][0]["ratio_to"]["slow"]["median"] == pytest.approx(2.5)
    assert arms["slow"][0]["ratio_to"]["fast"]["median"] == pytest.approx(0.4)
    assert arms["fast"][0]["ratio_to"]["none"] == arms["fast"][0]["ratio"]


def test_tables_fit_a_terminal_and_show_the_ratio(
    arms: dict[str, list[dict[str, Any]]],
) -> None:
    console = Console(width=80, record=True)
    console.print(overview_table(arms))
    console.print(task_table(arms))
    text = console.export_text()
    assert "2.50 [2.50 2.50]" in text
    assert "10.0" in text
    assert "5.00" in text
    assert "odd" in text
    assert "fast b1" in text
    assert "…" not in text


def test_several_data_sets_have_lines_of_their_own(FakeEngine: Any, ten_tokens: Any) -> None:
    prompts = [
        EncodedPrompt(i, task, [i], task.partition("/")[0])
        for i, task in enumerate(["two/b", "two/a", "one", "one"])
    ]
    engines = {"none": FakeEngine(ten_tokens), "same": FakeEngine(ten_tokens)}
    plan = Plan([1, 3], rounds=1, max_tokens=8, temperature=0.0)
    arms = summarise(list(run(engines, prompts, [9], plan)))
    assert {k: v["groups"] for k, v in arms["same"][0]["datasets"].items()} == {"two": 2, "one": 2}
    console = Console(width=80, record=True)
    console.print(task_table(arms))
    text = console.export_text()
    lines = [line.split() for line in text.rpartition("─")[2].splitlines() if line.strip()]
    assert [line[0] for line in lines] == ["two", "two/a", "two/b", "one", "(mixed)"]
    assert [line.count("-") for line in lines] == [1, 1, 1, 1, 1]  # sizes that do not have it


def test_plot_writes_an_image(arms: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(arms, tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")


def test_accepted_tokens_beyond_the_end_of_an_answer_are_no_steps_saved(
    request_of: Any,
) -> None:
    # Two tokens in two steps; the second step accepted five drafts, four of them beyond the end.
    result = GenerateResult(
        [request_of([1, 2])], 0.1, draft_tokens=8, accepted_tokens=5, request_steps=2
    )
    prompts = [EncodedPrompt(0, "task", [1])]
    measured = [Measurement(name, 1, 0, 0, prompts, result) for name in ("none", "fast")]
    entry = summarise(measured)["fast"][0]
    assert (entry["tokens_per_step"], entry["rows_per_step"]) == (1.0, 5.0)
