# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ext.request_options import RequestOptionError, node_cap
from vllm_ext.worker.drafting import node_limit


@pytest.mark.parametrize(
    ("given", "cap"),
    [
        (None, None),
        ({}, None),
        ({"other": 1}, None),
        ({"speculation": True}, None),
        ({"speculation": "true"}, None),
        ({"speculation": 1}, None),
        ({"speculation": False}, 0),
        ({"speculation": "False "}, 0),
        ({"speculation": "off"}, 0),
        ({"speculation": 0}, 0),
        ({"speculation": 0.0}, 0),
        ({"max_nodes": 4}, 4),
        ({"max_nodes": 4.0}, 4),
        ({"max_nodes": "4"}, 4),
        ({"max_nodes": 0}, 0),
        ({"max_nodes": 4, "speculation": True}, 4),
        ({"max_nodes": 4, "speculation": "no"}, 0),
    ],
)
def test_values_that_mean_something(given: dict[str, Any] | None, cap: int | None) -> None:
    assert node_cap(given) == cap


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"speculation": "perhaps"}, "speculation='perhaps'; give true or false"),
        ({"speculation": 2}, "speculation=2"),
        ({"speculation": None}, "speculation=None"),
        ({"speculation": []}, "speculation="),
        ({"max_nodes": -1}, "max_nodes=-1; give a whole number from 0 to 1024"),
        ({"max_nodes": 1.5}, "max_nodes=1.5"),
        ({"max_nodes": "many"}, "max_nodes='many'"),
        ({"max_nodes": "nan"}, "max_nodes='nan'"),
        ({"max_nodes": 1e300}, "max_nodes=1e"),
        ({"max_nodes": 10**400}, "max_nodes=1000"),
        ({"max_nodes": 10**5000}, "max_nodes=a huge integer"),
        ({"speculation": 10**5000}, "speculation=a huge integer"),
        ({"max_nodes": True}, "max_nodes=True"),
        ({"max_nodes": [4]}, "max_nodes="),
        ({"max_nodes": "x", "speculation": False}, "max_nodes='x'"),
    ],
)
def test_nonsense_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestOptionError, match=message) as refusal:
        node_cap(given)
    assert refusal.value.key == message.partition("=")[0]


def test_a_message_does_not_grow_with_the_request() -> None:
    for key in ("speculation", "max_nodes"):
        with pytest.raises(RequestOptionError) as refusal:
            node_cap({key: "x" * 10**6})
        assert len(str(refusal.value)) < 300


def test_the_cap_lowers_the_limit_and_never_raises_it() -> None:
    def limit(**extra: Any) -> int:
        params = SimpleNamespace(extra_args=extra or None, max_tokens=100)
        state = SimpleNamespace(sampling_params=params, num_tokens=10, output_token_ids=[1])
        return node_limit(state, max_model_len=500, most=24)

    assert limit() == 24
    assert limit(max_nodes=5) == 5
    assert limit(max_nodes=500) == 24
    assert limit(speculation=False) == 0


def test_a_bad_value_is_refused_where_vllm_checks_parameters() -> None:
    vllm = pytest.importorskip("vllm")
    from vllm_ext.config import PLACEHOLDER_CLASS
    from vllm_ext.plugin import register

    register()
    ours, theirs = SimpleNamespace(model=PLACEHOLDER_CLASS), SimpleNamespace(model="other")
    bad = vllm.SamplingParams(extra_args={"max_nodes": "x"})
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="max_nodes='x'") as refusal:
        bad._validate_spec_decode(ours)
    assert refusal.value.parameter == "extra_args.max_nodes"
    bad._validate_spec_decode(theirs)  # other methods may give the name another meaning
    vllm.SamplingParams(extra_args={"max_nodes": "3"})._validate_spec_decode(ours)
