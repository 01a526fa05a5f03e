# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import Any

import pytest

from logits_processors.constraint import ConstraintError
from logits_processors.vocabulary import Vocabulary

json_schemas = pytest.importorskip("json_schemas")

VOCABULARY = Vocabulary((b"", *(bytes([i]) for i in range(256))), (0,))
ROW = {
    "id": "r",
    "schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    "tests": [
        {"data": {"a": 1}, "valid": True},
        {"data": {"a": "x"}, "valid": False},
        {"data": {}, "valid": False},
    ],
}


def encode(text: str) -> list[int]:
    return [byte + 1 for byte in text.encode()]


def no_limit(kind: str, source: str) -> None:
    pass


@pytest.mark.parametrize("engine", ["xgrammar", "llguidance", "json_validate"])
def test_labelled_instances_are_fed_token_by_token(engine: str) -> None:
    found = json_schemas.evaluate(engine, ROW, VOCABULARY, encode, no_limit)
    assert found["compiled"], found["error"]
    assert [test["accepted"] for test in found["tests"]] == [True, False, False]
    whole = found["tests"][0]
    assert len(whole["mask_us"]) == len(whole["check_us"]) == len('{"a": 1}') + 1
    assert whole["refused_at"] is None
    refused = found["tests"][1]["refused_at"]
    assert refused == ('{"a": "x"}'.index('"x') if engine != "json_validate" else refused)


def test_a_constraint_that_checks_nothing_is_found_out() -> None:
    blind = {**ROW, "schema": {}}
    found = json_schemas.evaluate("json_validate", blind, VOCABULARY, encode, no_limit)
    summary = json_schemas.summarise([found])
    assert summary["under"]["hits"] == 2
    assert summary["faithful"]["hits"] == 0


def test_refusals_are_counted_by_kind() -> None:
    def refuse(kind: str, source: str) -> None:
        raise ConstraintError('lark: Unimplemented keys: ["not"]')

    found = json_schemas.evaluate("llguidance", ROW, VOCABULARY, encode, refuse)
    summary = json_schemas.summarise([found])
    assert summary["coverage"]["hits"] == 0
    assert summary["refusals"] == {"unsupported keyword": 1}
    assert summary["mask_us"]["n"] == 0


def entry(*tests: tuple[bool, bool, str]) -> dict[str, Any]:
    return {
        "compiled": True,
        "compile_ms": 1.0,
        "first_mask_ms": 2.0,
        "tests": [
            {"valid": v, "accepted": a, "error": e, "mask_us": [1.0], "check_us": [2.0]}
            for v, a, e in tests
        ],
    }


def test_agreement_with_the_labels_is_counted(tmp_path: Path) -> None:
    summary = json_schemas.summarise(
        [
            entry((True, True, ""), (False, False, "")),
            entry((True, False, ""), (False, True, ""), (False, False, "")),
            entry((True, False, "gave up")),
            {"compiled": False, "error": "too long"},
        ]
    )
    assert (summary["coverage"]["hits"], summary["coverage"]["n"]) == (3, 4)
    assert (summary["under"]["hits"], summary["under"]["n"]) == (1, 3)
    assert (summary["over"]["hits"], summary["over"]["n"]) == (1, 2)
    assert (summary["faithful"]["hits"], summary["faithful"]["n"]) == (1, 4)
    assert summary["runtime_errors"] == 1
    assert summary["mask_us"]["n"] == 5
    results = {"set": {"xgrammar": summary}}
    assert "1/3 = 33.3%" in json_schemas.report(results)
    json_schemas.plot(results, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 0
    json.dumps(results)
