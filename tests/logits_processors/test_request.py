# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logits_processors.compilation import Spec
from logits_processors.constraint import ConstraintError
from logits_processors.request import (
    ConstraintRequest,
    MirostatRequest,
    MomentumRequest,
    RequestError,
    is_ours,
    parse_request,
    table,
)


@pytest.mark.parametrize("extra", [None, {}, {"other": 1}, {1: 2}, {"constrain": "x"}])
def test_requests_of_others_are_none_of_our_business(extra: Any) -> None:
    assert parse_request(extra) is None


def test_what_is_allowed() -> None:
    for kind in ConstraintRequest.model_fields:
        if kind.startswith("constraint_json") or kind in ("constraint_ebnf", "constraint_lark"):
            request = parse_request({kind: "source", "theirs": 1, 2: 3})
            assert isinstance(request, ConstraintRequest)
            assert request.spec == Spec(kind.removeprefix("constraint_"), "source")
    full = {
        "constraint_predicate": "name",
        "constraint_argument": "text",
        "constraint_method": "masking",
        "constraint_estimator": "geometric",
        "constraint_max_rejects": 100_000,
        "constraint_max_accepts": 1000,
        "constraint_seed": -(2**63),
        "constraint_id": "x" * 128,
        "constraint_prefix": 3,
    }
    request = parse_request(full)
    assert isinstance(request, ConstraintRequest)
    assert request.model_dump(exclude_none=True) == full
    assert request.spec == Spec("predicate", "name", "text")
    assert isinstance(
        parse_request({"mirostat_version": 2, "mirostat_tau": 3, "mirostat_eta": 0.5}),
        MirostatRequest,
    )
    assert isinstance(
        parse_request({"momentum_alpha": 0, "momentum_top_k": 10**30}), MomentumRequest
    )


REGEX = {"constraint_regex": "a"}


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"constraint_id": "a"}, "no constraint given"),
        (REGEX | {"constraint_lark": "b"}, "constraint_lark and constraint_regex given"),
        ({"constraint_regex": None}, "no constraint given"),
        (REGEX | {"constraint_colour": 1}, "constraint_colour: unknown key"),
        (REGEX | {"mirostat_version": 1}, "keys of different processors"),
        (REGEX | {"constraint_argument": "x"}, "constraint_argument given with constraint_regex"),
        ({"constraint_regex": 1}, "constraint_regex given as 1"),
        ({"constraint_regex": ["a"]}, "constraint_regex given as"),
        ({"constraint_regex": b"a"}, "constraint_regex given as"),
        (REGEX | {"constraint_method": "magic"}, "'awrs', 'masking', 'asap' or 'cars'"),
        (REGEX | {"constraint_estimator": ""}, "constraint_estimator"),
        (REGEX | {"constraint_max_rejects": 0}, "constraint_max_rejects given as 0"),
        (REGEX | {"constraint_max_accepts": 1}, "constraint_max_accepts"),
        (REGEX | {"constraint_seed": 2**64}, "constraint_seed"),
        (REGEX | {"constraint_seed": 10**5000}, "constraint_seed given as a huge integer"),
        (REGEX | {"constraint_seed": True}, "constraint_seed given as True"),
        (REGEX | {"constraint_seed": 1.0}, "constraint_seed given as 1.0"),
        (REGEX | {"constraint_seed": float("nan")}, "constraint_seed given as nan"),
        (REGEX | {"constraint_id": ""}, "constraint_id"),
        (REGEX | {"constraint_id": "x" * 129}, "constraint_id"),
        (REGEX | {"constraint_prefix": -1}, "constraint_prefix"),
        (REGEX | {"constraint_prefix": 1, "constraint_method": "cars"}, "constraint_prefix given"),
        ({"constraint_regex": "\ud800"}, "'constraint_regex' holds half of a surrogate pair"),
        ({"constraint_\udc00": "a"}, r"'constraint_\udc00' holds half"),
        ({"mirostat_tau": 1.0}, "mirostat_version is missing"),
        ({"mirostat_version": 3}, "mirostat_version given as 3"),
        ({"mirostat_version": 1, "mirostat_tau": float("nan")}, "mirostat_tau given as nan"),
        ({"mirostat_version": 1, "mirostat_eta": float("inf")}, "mirostat_eta given as inf"),
        ({"mirostat_version": 1, "mirostat_tau": -1.0}, "mirostat_tau given as -1.0"),
        ({"momentum_alpha": 10**400}, "momentum_alpha"),
        ({"momentum_alpha": 1, "momentum_top_k": 0}, "momentum_top_k"),
    ],
)
def test_refusals_name_the_key_and_stay_short(extra: Any, named: str) -> None:
    with pytest.raises(ConstraintError) as refusal:
        parse_request(extra)
    message = str(refusal.value)
    assert named in message
    message.encode()  # it will be part of an HTTP answer
    assert len(message) < 1000


@pytest.mark.parametrize("value", ["x" * 10**6, ["x" * 10**6], [[[["x" * 999]] * 999] * 9]])
def test_messages_do_not_grow_with_the_request(value: Any) -> None:
    with pytest.raises(ConstraintError) as refusal:
        parse_request(REGEX | {"constraint_method": value})
    assert len(str(refusal.value)) < 500


@pytest.mark.parametrize(
    "extra",
    [
        REGEX | {"constraint_" + "x" * 10**6: 1},
        REGEX | {"mirostat_" + "x" * 10**6: 1},
        {"constraint_\ud800" + "x" * 10**6: 1},
        REGEX | {f"constraint_{i}": i for i in range(999)},
        REGEX | {f"mirostat_{i}": i for i in range(999)},
    ],
    ids=["unknown", "of another", "no text", "many unknown", "many of another"],
)
def test_messages_do_not_grow_with_the_keys(extra: Any) -> None:
    with pytest.raises(RequestError) as refusal:
        parse_request(extra)
    assert len(str(refusal.value)) < 5000
    assert len(refusal.value.key) <= 200
    refusal.value.key.encode()


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        (REGEX | {"constraint_seed": "1"}, "constraint_seed"),
        (REGEX | {"constraint_colour": 1}, "constraint_colour"),
        (REGEX | {"constraint_lark": "b"}, "constraint_regex"),
        (REGEX | {"constraint_argument": "x"}, "constraint_argument"),
        (REGEX | {"constraint_prefix": 1, "constraint_method": "asap"}, "constraint_prefix"),
        (REGEX | {"momentum_alpha": 1.0}, "constraint_regex"),
        ({"constraint_seed": 1}, "constraint_*"),
        ({"mirostat_tau": 1.0}, "mirostat_version"),
        ({"constraint_\udc00": "a"}, r"constraint_\udc00"),
        ({"constraint_regex": "\ud800"}, "constraint_regex"),
    ],
)
def test_refusals_know_the_key_to_change(extra: Any, key: str) -> None:
    with pytest.raises(RequestError) as refusal:
        parse_request(extra)
    assert refusal.value.key == key


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from([n for n, *_ in table()]) | st.text(), JSON, max_size=4))
def test_any_request_is_read_or_refused(extra: dict[str, Any]) -> None:
    try:
        request = parse_request(extra)
    except ConstraintError:
        assert any(map(is_ours, extra))
    else:
        assert (request is None) is not any(map(is_ours, extra))


def test_the_table_knows_every_key() -> None:
    rows = list(table())
    assert len({key for key, *_ in rows}) == len(rows)
    assert ("mirostat_version", "1 / 2", "required") in [row[:3] for row in rows]
    assert ("constraint_max_rejects", "int", "64") in [row[:3] for row in rows]
    assert all(kind and description for _, kind, _, description in rows)
