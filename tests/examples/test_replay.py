# SPDX-License-Identifier: Apache-2.0
"""The replay counts what an engine would count."""

from __future__ import annotations

import importlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from proposers import DySpecOptions, TokenTree, TreeDrafter
from tests.proposers.conftest import TableSource

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names = ("replay", "replay_rows", "replay_jacobi")
    yield importlib.import_module("replay")
    for name in names:
        sys.modules.pop(name, None)


def recording(module: ModuleType, prompt: list[int], continuation: list[int]) -> Any:
    top = [[token] for token in continuation]
    return module.Recording(
        "set", "task", 0.0, prompt, continuation, top, [[0.9]] * len(continuation)
    )


def drafter(module: ModuleType, table: dict, nodes: int = 2) -> TreeDrafter:
    source = TableSource(table)
    return TreeDrafter(50, DySpecOptions(max_nodes=nodes), module.FreeRows(), [source])


class NoRows:
    """Knows nothing off the text, and what it was asked."""

    def __init__(self) -> None:
        self.paths: list[Any] = []

    def of(self, text: Any, position: int, paths: list[Any]) -> list[None]:
        self.paths.append((position, *paths))
        return [None] * len(paths)


def test_steps_tokens_and_rows(replay: ModuleType) -> None:
    # After 2 comes 3, 4 as drafted; after 4 comes 9, which was drafted as 5, 6.
    made = drafter(replay, {2: {3: 0.9}, 3: {4: 0.9}, 4: {5: 0.9}, 5: {6: 0.9}})
    rows = NoRows()
    done = replay.replay(made, recording(replay, [1, 1], [2, 3, 4, 9, 7, 7]), rows, "r")
    # Steps: [3, 4] accepted and 9 emitted; nothing drafted, 7; nothing drafted, 7.
    assert (done.steps, done.tokens, done.rows) == (3, 5, 5)
    assert rows.paths == [(3, (3,), (3, 4))]


def test_a_path_ends_where_the_text_does(replay: ModuleType) -> None:
    made = drafter(replay, {2: {3: 0.9}, 3: {4: 0.9}})
    done = replay.replay(made, recording(replay, [1, 1], [2, 3]), NoRows(), "r")
    assert (done.steps, done.tokens) == (1, 1)


def test_learns_along_the_text_and_from_rejected_rows_if_told(replay: ModuleType) -> None:
    class Row(NoRows):
        def of(self, text: Any, position: int, paths: list[Any]) -> list[Any]:
            return [([8], [0.9])] * len(paths)

    counts = []
    for rejected in (True, False):
        made = drafter(replay, {2: {3: 0.9}}, nodes=1)
        replay.replay(made, recording(replay, [1, 1], [2, 9, 2, 9]), Row(), "r", rejected=rejected)
        counts.append(made._sources[0].observed)
    assert counts[0] == counts[1] + 2


def test_the_accepted_path(replay: ModuleType) -> None:
    tree = TokenTree((3, 4, 5), (-1, 0, -1), (0.9, 0.8, 0.1))
    assert replay.accepted_path(tree, [3, 4, 9]) == [0, 1]
    assert replay.accepted_path(tree, [5, 4]) == [2]
    assert replay.accepted_path(tree, [9]) == []


def test_jacobi_guesses_are_compared_with_the_next_step(replay: ModuleType) -> None:
    jacobi = importlib.import_module("replay_jacobi").JacobiCount()
    tree = TokenTree((3, 4), (-1, -1), (0.9, 0.1))
    rows = [([7, 8], [0.5, 0.4]), ([6, 5], [0.5, 0.4])]
    jacobi.look(tree, [1], rows, [4, 7])  # 4 was accepted: nothing rejected below it
    jacobi.look(tree, [], rows, [9, 8])  # 3 was rejected: after it the target said 7, 8
    jacobi.look(tree, [], rows, [8])
    assert (jacobi.steps, jacobi.first, jacobi.among_three, jacobi.only_jacobi) == (1, 0, 1, 1)
    jacobi.forget()
    jacobi.look(tree, [], rows, [7])
    assert jacobi.steps == 1


def test_report_and_command(
    replay: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    lines = [
        {
            "set": name, "task": "t", "temperature": 0.0, "prompt": [5, 6, 7, 5, 6],
            "continuation": [7, 5, 6, 7, 5, 6], "top_ids": [[7], [5], [6]] * 2,
            "top_probs": [[0.9]] * 6,
        }
        for name in ("a", "b")
    ]  # fmt: skip
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "config.json").write_text('{"vocab_size": 50}')
    command = ["replay", "--model", str(tmp_path), "--recording", str(tmp_path / "r.jsonl")]
    command += ["--memo-only", "--temperature", "0", "--arm", "suffix_tree", "--arm"]
    command += ['none=suffix_tree:{"max_depth": 1, "min_probability": 0.99}']
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    replay.main()
    printed = capsys.readouterr().out
    assert "| none | 1.000 [1.00, 1.00] | 1.00 |" in printed
    assert "2 requests, 10 tokens" in printed
    suffix = next(line for line in printed.splitlines() if line.startswith("| suffix_tree |"))
    assert float(suffix.split("|")[2].split()[0]) > 1.5


def test_the_interval_holds_the_rate(replay: ModuleType) -> None:
    one = recording(replay, [1, 1], [2, 3])
    replays = [replay.Replay(one, steps=10, tokens=10 + i, rows=20) for i in range(10)]
    low, high = replay.interval(replay.rate, replays)
    assert low < replay.rate(replays) == 1.45 < high
    replay.report({"x": replays}, io.StringIO())
