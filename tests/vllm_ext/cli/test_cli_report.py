# SPDX-License-Identifier: Apache-2.0
"""Results as Markdown: every number of the table is one of the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_ext.cli import app
from vllm_ext.cli.bench_report import summarise
from vllm_ext.cli.bench_run import Plan, run
from vllm_ext.cli.prompts import EncodedPrompt
from vllm_ext.cli.report import HEADERS, markdown


@pytest.fixture
def result(FakeEngine: Any, request_of: Any) -> dict[str, Any]:
    prompts = [EncodedPrompt(i, f"set{i % 2}/task", [i], f"set{i % 2}") for i in range(4)]
    engines = {
        "none": FakeEngine(lambda ids, _: request_of(list(range(10))), seconds_per_token=0.05),
        "fast": FakeEngine(
            lambda ids, _: request_of(list(range(10))),
            seconds_per_token=0.02,
            drafted=12,
            accepted=6,
            drafting_share=0.1,
        ),
    }
    plan = Plan([1, 2], rounds=1, max_tokens=8, temperature=0.0)
    return {
        "environment": {
            "cores": 2,
            "cpu": "a processor",
            "memory_gib": 8,
            "gpu": [],
            "load_average": [0.1, 0.0, 0.0],
            "load_average_after": [1.4, 0.0, 0.0],
            "python": "3.11",
            "versions": {"vllm": "0.32.0", "torch": None},
            "git_commit": "abc",
        },
        "settings": {
            "llm": {"model": "/a/folder/model", "dtype": "float32"},
            "compiled": False,
            "server": False,
            "temperature": 0.0,
            "max_tokens": 8,
            "rounds": 1,
            "datasets": {"set0": 2, "set1": 2},
        },
        "arms": summarise(list(run(engines, prompts, [9], plan))),
    }


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_one_line_per_arm_and_batch(result: dict[str, Any]) -> None:
    found = rows(markdown(result))
    assert found[0] == list(HEADERS)
    assert found[2][:2] == ["`none`", "1"]
    assert found[2][7] == "1"
    assert found[4] == [
        *("`fast`", "1", "50.0", "2.50", "4.00", "100.0", "22.2"),
        *("2.50 [2.50, 2.50]", "100%", "10.0%"),
    ]
    assert [row[:2] for row in found[2:6]] == [
        ["`none`", "1"],
        ["`none`", "2"],
        ["`fast`", "1"],
        ["`fast`", "2"],
    ]


def test_rounds_are_shown_one_by_one(result: dict[str, Any]) -> None:
    text = markdown(result)
    assert "started anew" not in text
    fast = result["arms"]["fast"][0]
    fast["ratio_by_round"] = [{"median": 2.4}, {"median": 2.61}]
    result["settings"] |= {"rounds": 2, "engines_per_round": True}
    text = markdown(result)
    assert "rounds: 2, engines started anew for each; prompts" in text
    assert rows(text)[4][7] == "2.50 [2.50, 2.50] (2.40, 2.61)"


def test_data_sets_and_their_tasks(result: dict[str, Any]) -> None:
    found = rows(markdown(result))[6:]
    assert found[0] == ["", "groups", "`fast`, batch 1", "`fast`, batch 2"]
    assert [row[0] for row in found[2:]] == [
        "**set0**",
        "set0/task",
        "**set1**",
        "set1/task",
        "**(mixed)**",
    ]
    assert found[2][1:] == ["2", "2.50 (2.50)", "-"]  # at batch 2 every group is mixed


def test_from_three_arms_on_they_are_compared_with_each_other(result: dict[str, Any]) -> None:
    assert "Ratio of two arms" not in markdown(result)
    slow = json.loads(json.dumps(result["arms"]["none"]))
    for entry in slow:
        entry["ratio_to"]["fast"] = {"median": 0.4, "low": 0.3, "high": 0.5}
        result["arms"]["fast"][0]["ratio_to"]["slow"] = {"median": 2.5, "low": 2.0, "high": 3.0}
        result["arms"]["fast"][1]["ratio_to"]["slow"] = {"median": 2.5, "low": 2.0, "high": 3.0}
    result["arms"]["slow"] = slow
    text = markdown(result).partition("Ratio of two arms")[2]
    assert rows(text)[:4] == [
        ["arm", "batch", "to `fast`", "to `slow`"],
        ["---", "---:", "---:", "---:"],
        ["`fast`", "1", "-", "2.50 [2.00, 3.00]"],
        ["`fast`", "2", "-", "2.50 [2.00, 3.00]"],
    ]
    assert rows(text)[4] == ["`slow`", "1", "0.40 [0.30, 0.50]", "-"]
    del result["arms"]["fast"][0]["ratio_to"]  # a result made before it was recorded
    assert "Ratio of two arms" not in markdown(result)


def test_conditions_name_no_folder(result: dict[str, Any]) -> None:
    text = markdown(result)
    assert "- model, float32, eager, offline, greedy" in text
    assert "/a/folder" not in text
    assert "vllm 0.32.0; commit abc" in text


def test_command(result: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(result))
    done = CliRunner().invoke(app, ["report", str(file)])
    assert done.exit_code == 0
    assert done.stdout == markdown(result)


@pytest.mark.parametrize("content", ["{", "[]", '{"arms": {}}', "3"])
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text(content)
    done = CliRunner().invoke(app, ["report", str(file)])
    assert done.exit_code == 2
    assert "is not a result of" in " ".join(done.output.replace("│", " ").split())


def test_instruction_sets_are_told_where_they_are_known(result: dict[str, Any]) -> None:
    assert "2 cores of a processor, 8 GiB" in markdown(result)
    result["environment"]["cpu_features"] = ["avx2", "amx_bf16"]
    assert "2 cores of a processor (avx2, amx_bf16), 8 GiB" in markdown(result)


def test_files_of_the_model_are_told_where_they_are_known(result: dict[str, Any]) -> None:
    assert "in the cache" not in markdown(result)
    result["settings"]["model_files"] = {"prime": "0123456789abcdef", "head": "fedcba9876543210"}
    assert "; in the cache: prime 01234567, head fedcba98\n" in markdown(result)
    result["settings"]["model_files"] = {}
    assert "; in the cache: nothing\n" in markdown(result)
