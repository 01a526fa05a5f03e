# SPDX-License-Identifier: Apache-2.0
"""On a card: the whole CUDA engine, with and without us, gives the same tokens in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.vllm_ext.engine import make_engine, make_tiny_model, prompts, spec_metrics, texts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

SPECULATIVE = {"method": "dyspec", "num_speculative_tokens": 12, "adaptive": False}
OPTIONS: dict[str, Any] = {
    "attention_backend": "TRITON_ATTN",  # the one that computes in float32
    "gpu_memory_utilization": 0.3,
    "enforce_eager": False,  # piecewise CUDA graphs around our attention
}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    model = make_tiny_model(tmp_path_factory.mktemp("model"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")  # both on the runner that ours needs
        plain = make_engine(model, None, **OPTIONS)
        ours = make_engine(model, dict(SPECULATIVE), **OPTIONS)
    yield plain, ours
    for engine in (plain, ours):
        engine.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.9, "seed": 3},
        {"temperature": 0.8, "seed": 5, "top_p": 0.9, "top_k": 20},
        {"repetition_penalty": 1.3},  # the sequential walk
        {"temperature": 1.0, "seed": 4, "min_p": 0.1},
    ],
    ids=str,
)
def test_same_tokens(engines: tuple[Any, Any], options: dict[str, Any]) -> None:
    from vllm import SamplingParams

    plain, ours = engines
    params = SamplingParams(
        **{"max_tokens": 40, "temperature": 0.0, "detokenize": False, **options}
    )
    requests = prompts(8, seed=9)
    expected = texts(plain, requests, params)
    for _ in range(2):  # the second time the drafter knows the text, and much is accepted
        assert texts(ours, requests, params) == expected


def test_trees_are_accepted(engines: tuple[Any, Any]) -> None:
    metrics = spec_metrics(engines[1])
    assert metrics["num_accepted_tokens"] > 50
