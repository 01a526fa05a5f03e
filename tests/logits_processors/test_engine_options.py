# SPDX-License-Identifier: Apache-2.0
"""What an operator sets is what holds, and what cannot be right stops the engine from starting."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from logits_processors.constraint import ConstraintError
from logits_processors.engine_options import read_options, table
from logits_processors.limits import OPTIONS_KEY, Bounds, Limits, check_source, limit_named

DOCS_PAGE = Path(__file__).parents[2] / "docs" / "constraints.md"


def options(given: Any) -> Any:
    return read_options({OPTIONS_KEY: given})


def test_options_are_read() -> None:
    assert options({}) == (Limits(), Bounds())
    limits, bounds = options({"compile_seconds": 3, "max_bytes": 10, "parked": 5})
    assert (limits.compile_seconds, limits.max_bytes, bounds.parked) == (3, 10, 5)
    assert limits.max_depth == Limits().max_depth


@pytest.mark.parametrize("nothing", [None, {}, {"others": 1, "vllm_ext": {}, 5: 6}, object()])
def test_what_is_not_ours_is_left_alone(nothing: Any) -> None:
    assert read_options(nothing) == (Limits(), Bounds())


@pytest.mark.parametrize(
    "given",
    [
        {"colour": 1},
        {5: 1},
        {"parked": 0},
        {"parked": -1},
        {"parked": True},
        {"parked": 1.5},
        {"parked": "5"},
        {"compile_seconds": math.nan},
        {"compile_seconds": math.inf},
        {"compile_seconds": True},
        {"compile_seconds": None},
        ["parked"],
        "parked",
    ],
)
def test_bad_options_are_named(given: Any) -> None:
    with pytest.raises(ValueError, match="vllm_ext_constraints") as refusal:
        options(given)
    for name, value in given.items() if isinstance(given, dict) else ():
        assert repr(name) in str(refusal.value)
        assert name not in Limits.model_fields | Bounds.model_fields or repr(value) in str(
            refusal.value
        )


def test_unknown_options_are_told_what_is_known() -> None:
    with pytest.raises(ValueError, match="unknown option 'max_byte'") as refusal:
        options({"max_byte": 1})
    assert all(name in str(refusal.value) for name, *_ in table())


def test_a_misspelt_key_is_no_silent_default() -> None:
    with pytest.raises(ValueError, match=r"vllm_ext_constraint'.*known: 'vllm_ext_constraints'"):
        read_options({"vllm_ext_constraint": {"max_bytes": 10}})


def test_a_refusal_says_how_to_raise_the_limit() -> None:
    """What it shows is what the command line takes, with a number in place of N."""
    limits = Limits(max_bytes=10)
    with pytest.raises(ConstraintError) as refusal:
        check_source("a" * 11, "regex", limits)
    [shown] = re.findall(r"--additional-config '(.*)'", str(refusal.value))
    raised, _ = read_options(json.loads(shown.replace("N", "11")))
    check_source("a" * 11, "regex", raised)
    with pytest.raises(ConstraintError, match="12 bytes given, at most 11 allowed"):
        check_source("a" * 12, "regex", raised)  # no more than was asked for


def test_every_limit_can_be_named() -> None:
    shown = limit_named(*Limits.model_fields)
    for name in Limits.model_fields:
        assert f'"{name}": N' in shown


def test_the_documentation_lists_every_option() -> None:
    lines = DOCS_PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index("| option | type | default | meaning |") + 2
    expected = ["| `{}` | {} | {} | {} |".format(*row) for row in table()]
    assert lines[start : start + len(expected)] == expected
    assert lines[start + len(expected)] == ""
    assert all(description for *_, description in table())


def test_the_documentation_shows_options_that_are_read() -> None:
    page = DOCS_PAGE.read_text(encoding="utf-8")
    [command] = re.findall(r"vllm serve MODEL --additional-config '(.*)'", page)
    [call] = re.findall(r"additional_config=(\{.*\}\})", page)
    assert read_options(json.loads(command)) == read_options(json.loads(call))
    assert read_options(json.loads(command)) != (Limits(), Bounds())
