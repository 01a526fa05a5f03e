# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from typing import Any

import pytest

json_engine = pytest.importorskip("json_engine")

OURS = "json_schema, masking"


def ran(tokens: Sequence[int], first: float, each: float, cold: bool) -> dict[str, Any]:
    return {
        "tokens": list(tokens),
        "complete": True,
        "first_ms": first,
        "token_ms": each,
        "cold": cold,
    }


def entry(key: str, **other: dict[str, Any]) -> dict[str, Any]:
    """A schema on which all ways of asking gave the same, but for the greedy ones in ``other``."""
    turns: dict[str, Any] = {
        turn: {arm: ran([1, 2, 3, 4], 10.0, 2.0, turn == "greedy") for arm in json_engine.ARMS}
        for turn in json_engine.TURNS
    }
    turns["greedy"] |= other
    return {"key": key, **turns}


def test_schemas_are_spread_and_short() -> None:
    rows = [{"id": str(i), "schema": {"const": "x" * (3000 * (i % 2))}} for i in range(20)]
    assert [row["id"] for row in json_engine.choose(rows, 5)] == ["0", "4", "8", "12", "16"]
    assert len(json_engine.choose(rows, 50)) == 10


def test_cold_and_warm_times_are_told_apart() -> None:
    slow = ran([1, 2, 3, 4], 90.0, 4.0, cold=True)
    found = json_engine.summarise([entry("a", **{OURS: slow})])["arms"][OURS]
    assert found["cold_first_ms"]["median"] == 90.0
    assert found["warm_first_ms"]["median"] == 10.0
    assert (found["cold_first_ms"]["n"], found["warm_first_ms"]["n"]) == (1, 1)
    assert found["token_ratio"]["mean"] == 1.5


def test_greedy_texts_are_compared_where_both_ran() -> None:
    entries = [
        entry("same"),
        entry("other", **{OURS: ran([1, 2, 9, 4], 1.0, 1.0, True)}),
        entry("longer", **{OURS: ran([1, 2, 3, 4, 5], 1.0, 1.0, True)}),
        entry("refused", **{OURS: {"refused": "no", "cold": True}}),
    ]
    found = json_engine.summarise(entries)
    equal = found["greedy_equal"][f"{OURS} = vLLM, xgrammar"]
    assert (equal["hits"], equal["n"]) == (1, 3)
    assert equal["different"] == [{"schema": "other", "at": 2}, {"schema": "longer", "at": 4}]
    assert found["arms"][OURS]["refused"] == 1
    text = json_engine.report(found)
    assert f"| {OURS} = vLLM, xgrammar | 1/3" in text
    assert f"| {OURS} | 7 | 1 |" in text
