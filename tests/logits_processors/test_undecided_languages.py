# SPDX-License-Identifier: Apache-2.0
"""Empty languages that cannot be told from the constraint: their requests end, with weight 0."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from toy_model import BYTES

from logits_processors.compilation import Spec, compile_constraint
from logits_processors.constraint import ConstraintRuntimeError
from logits_processors.request import parse_request
from logits_processors.sessions import Asked, Sessions

LONGEST = 12
LOOK_AROUND = {"constraint_regex_partial": "a(?!b)b"}
CONTRADICTION = {
    "constraint_json_validate": json.dumps({"allOf": [{"type": "boolean"}, {"type": "null"}]})
}
# llguidance takes it, and says so only when it gets there.
NO_SUCH_CHARACTER = {"constraint_lark": 'start: "a" T\nT: /[a-z]/ & /[0-9]/'}


def store() -> Sessions:
    return Sessions(lambda: BYTES, BYTES.eos_ids, "toy", "n")


def run(sessions: Sessions, keys: dict[str, str], method: str, favourite: bytes) -> Any:
    """The record of a request to a model that writes ASCII and likes one token."""
    request = parse_request({**keys, "constraint_method": method, "constraint_id": "a"})
    assert request is not None
    session = sessions.open(Asked(request, 1.0, 0, 1.0, 3, LONGEST, (0, 1)), [])
    logits = np.where([token.isascii() for token in BYTES.tokens], 0.0, -np.inf)
    logits[BYTES.tokens.index(favourite)] = 9.0
    text: list[int] = []
    while len(text) < LONGEST and not (text and text[-1] in BYTES.eos_ids):
        try:
            text.append(session.choose(logits).token or 0)
        except ConstraintRuntimeError as error:  # as the engine's batch does
            session.fail(str(error))
        session.follow(text)
    sessions.close(session)
    (record,) = sessions.pop(["a"])
    return record


@pytest.mark.parametrize("method", ["awrs", "masking", "asap"])
@pytest.mark.parametrize(
    ("keys", "favourite"), [(LOOK_AROUND, b"a"), (CONTRADICTION, b"t"), (CONTRADICTION, b"n")]
)
def test_they_end_in_a_dead_end(keys: dict[str, str], favourite: bytes, method: str) -> None:
    kind, source = next((key.removeprefix("constraint_"), text) for key, text in keys.items())
    compile_constraint(Spec(kind, source), BYTES)  # type: ignore[arg-type]
    record = run(store(), keys, method, favourite)
    assert record.state == "dead_end"
    assert record.log_weights[-1] == -np.inf
    assert len(record.token_ids) < LONGEST


@pytest.mark.parametrize(("method", "state"), [("awrs", "incomplete"), ("asap", "dead_end")])
def test_a_value_that_never_has_to_finish_ends_at_the_limit(method: str, state: str) -> None:
    record = run(store(), CONTRADICTION, method, b"1")
    assert record.state == state
    assert len(record.token_ids) == LONGEST


def test_cars_learns_that_nothing_is_left() -> None:
    """The text is rejected once; drawn again, it is known to be impossible."""
    sessions = store()
    states = [run(sessions, LOOK_AROUND, "cars", b"a").state for _ in range(2)]
    assert states == ["restart", "dead_end"]


def test_an_engine_that_gives_up_is_an_error() -> None:
    record = run(store(), NO_SUCH_CHARACTER, "awrs", b"a")
    assert (record.state, record.token_ids) == ("error", [ord("a")])
    assert "NoExtensionBias" in record.error


def test_a_language_that_is_not_empty_ends_otherwise() -> None:
    """The control."""
    keys = {"constraint_regex_partial": "a(?!b)c"}
    assert run(store(), keys, "awrs", b"a").state == "complete"
