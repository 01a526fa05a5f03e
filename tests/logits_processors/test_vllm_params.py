# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from logits_processors.request import ConstraintRequest
from logits_processors.vllm_params import check_params

REGEX = {"constraint_regex": "a"}
CARS = REGEX | {"constraint_method": "cars"}
MIROSTAT = {"mirostat_version": 2}


def sampling(extra: Any = REGEX, **options: Any) -> SamplingParams:
    return SamplingParams(extra_args=extra, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.3, "top_k": 5, "top_p": 0.5, "seed": 1, "n": 3},
        {"logit_bias": {1: 2.0}, "allowed_token_ids": [1], "min_tokens": 2},
        {"stop": ["x"], "stop_token_ids": [3], "logprobs": 2, "max_tokens": None},
        {"extra": CARS | {"constraint_seed": 3}},
        {"extra": MIROSTAT, "n": 2, "presence_penalty": 1.0},
        {"extra": {"momentum_alpha": 0.1}, "temperature": 0.0},
    ],
)
def test_what_goes_together(options: dict[str, Any]) -> None:
    assert check_params(sampling(**options)) is not None


def test_requests_of_others_may_do_anything() -> None:
    assert check_params(SamplingParams(presence_penalty=1.0)) is None
    assert check_params(sampling({"x": 1}, min_p=0.5)) is None


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"min_p": 0.1}, "min_p"),
        ({"presence_penalty": 0.1}, "presence_penalty"),
        ({"frequency_penalty": -0.1}, "frequency_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"structured_outputs": StructuredOutputsParams(regex="a")}, "structured_outputs"),
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
        ({"extra": CARS, "temperature": 0.0}, "temperature"),
        ({"extra": MIROSTAT, "temperature": 0.0}, "temperature"),
        ({"extra": REGEX | {"constraint_seed": 1}, "n": 2}, "n"),
        ({"extra": REGEX | {"constraint_seed": "1"}}, "extra_args.constraint_seed"),
        ({"extra": {"mirostat_tau": 1.0}}, "extra_args.mirostat_version"),
    ],
)
def test_refusals_name_the_parameter(options: dict[str, Any], parameter: str) -> None:
    with pytest.raises(VLLMValidationError) as refusal:
        check_params(sampling(**options))
    assert refusal.value.parameter == parameter
    assert isinstance(check_params(sampling()), ConstraintRequest)
