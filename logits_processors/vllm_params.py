# SPDX-License-Identifier: Apache-2.0
"""Which of vLLM's sampling parameters go together with our processors.

A constraint draws the token itself, from the law that temperature, top-k and top-p make of the
logits. What vLLM applies before it (logit_bias, allowed_token_ids, bad_words, min_tokens) is part
of the model's law; what it would apply afterwards would be lost, and is refused.
"""

from __future__ import annotations

from typing import Any

from vllm.exceptions import VLLMValidationError

from .request import ConstraintRequest, MirostatRequest, Request, RequestError, parse_request

_NEUTRAL = {
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "ignore_eos": False,
    "structured_outputs": None,
    "thinking_token_budget": None,
}


def check_params(params: Any) -> Request | None:
    """Return what a request asks of our processors, ``None`` if nothing.

    Args:
        params: vLLM's ``SamplingParams``.

    Raises:
        VLLMValidationError: a bad key, or sampling parameters that do not go together with it.
    """
    try:
        request = parse_request(params.extra_args)
    except RequestError as error:
        raise VLLMValidationError(str(error), parameter=f"extra_args.{error.key}") from None
    if isinstance(request, ConstraintRequest):
        for name, neutral in _NEUTRAL.items():
            value = getattr(params, name, neutral)
            if value != neutral:
                raise VLLMValidationError(
                    f"{name} cannot be used together with a constraint: the constraint draws from "
                    "the law of temperature, top_k and top_p. Leave it out, or put its effect "
                    "into the constraint",
                    parameter=name,
                    value=value,
                )
        if request.constraint_method in ("asap", "cars") and params.temperature == 0.0:
            raise VLLMValidationError(
                f"constraint_method {request.constraint_method!r} samples and needs a temperature "
                "above 0; for the most probable text use 'awrs' or 'masking'",
                parameter="temperature",
                value=params.temperature,
            )
        if request.constraint_seed is not None and params.n > 1:
            raise VLLMValidationError(
                "constraint_seed gives all n texts the same noise; with n above 1 use seed, which "
                "vLLM counts up from text to text",
                parameter="n",
                value=params.n,
            )
    if isinstance(request, MirostatRequest) and params.temperature == 0.0:
        raise VLLMValidationError(
            "mirostat controls sampling and needs a temperature above 0",
            parameter="temperature",
            value=params.temperature,
        )
    return request
