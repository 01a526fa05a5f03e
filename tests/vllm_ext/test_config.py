# SPDX-License-Identifier: Apache-2.0
"""Translation of a speculative config, and what is refused before an engine starts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ext.config import CONFIG_KEY, CPU_WORKER, PLACEHOLDER_CLASS, read_options, translate
from vllm_ext.methods import OptionError


def engine_args(config: dict[str, Any] | None, **more: Any) -> Any:
    made: dict[str, Any] = {
        "speculative_config": config,
        "spec_method": None,
        "spec_model": None,
        "spec_tokens": None,
        "additional_config": {},
        "async_scheduling": None,
    }
    return SimpleNamespace(**{**made, **more})


def parallel_config(**more: Any) -> Any:
    return SimpleNamespace(**{"worker_cls": "auto", "pipeline_parallel_size": 1, **more})


def model_config(**more: Any) -> Any:
    made = {
        "runner_type": "generate",
        "is_encoder_decoder": False,
        "is_hybrid": False,
        "is_attention_free": False,
    }
    return SimpleNamespace(**{**made, **more})


def translated(config: dict[str, Any] | None, **more: Any) -> tuple[Any, Any]:
    args, parallel = engine_args(config, **more), parallel_config()
    translate(args, model_config(), parallel)
    return args, parallel


def test_rides_on_custom_class() -> None:
    args, parallel = translated({"method": "dyspec", "num-speculative-tokens": 7, "max_depth": 3})
    assert args.speculative_config == {
        "method": "custom_class",
        "model": PLACEHOLDER_CLASS,
        "num_speculative_tokens": 7,
    }
    assert parallel.worker_cls == CPU_WORKER
    name, options = read_options(SimpleNamespace(additional_config=args.additional_config))
    assert (name, options.num_speculative_tokens, options.max_depth) == ("dyspec", 7, 3)


def test_keeps_other_additional_config() -> None:
    args, _ = translated({"method": "dyspec"}, additional_config={"mine": 1})
    assert args.additional_config["mine"] == 1


def test_flags_are_merged() -> None:
    args, _ = translated(None, spec_method="dyspec", spec_tokens=9)
    assert args.speculative_config["num_speculative_tokens"] == 9
    assert args.spec_method is None
    assert args.spec_tokens is None


def test_a_second_pass_changes_nothing_but_the_worker() -> None:
    args, _ = translated({"method": "dyspec"})
    before = dict(args.speculative_config), dict(args.additional_config)
    parallel = parallel_config()
    translate(args, model_config(), parallel)
    assert parallel.worker_cls == CPU_WORKER
    assert (args.speculative_config, args.additional_config) == before


@pytest.mark.parametrize(
    "config",
    [
        None,
        {"method": "ngram", "num_speculative_tokens": 3},
        {"method": ["dyspec"]},  # vLLM refuses it, see test_plugin.py
        {"method": {"dyspec": 1}},
    ],
)
def test_others_are_left_alone(config: dict[str, Any] | None) -> None:
    args, parallel = translated(config)
    assert args.speculative_config == config
    assert parallel.worker_cls == "auto"
    assert CONFIG_KEY not in args.additional_config


@pytest.mark.parametrize(
    ("args", "model", "parallel", "environment", "message"),
    [
        ({}, {}, {"pipeline_parallel_size": 2}, {}, "pipeline_parallel_size is 2.*use 1"),
        ({}, {}, {}, {"VLLM_USE_V2_MODEL_RUNNER": "1"}, "unset it or set it to 0"),
        ({}, {}, {}, {"VLLM_COMPUTE_NANS_IN_LOGITS": "1"}, "unset it"),
        ({"async_scheduling": True}, {}, {}, {}, "remove --async-scheduling"),
        ({}, {"is_hybrid": True}, {}, {}, "recurrent layers"),
        ({}, {"is_attention_free": True}, {}, {}, "recurrent layers"),
        ({}, {"is_encoder_decoder": True}, {}, {}, "encoder-decoder"),
        ({}, {"runner_type": "pooling"}, {}, {}, "'pooling' generates no tokens"),
        ({}, {}, {"decode_context_parallel_size": 2}, {}, "decode_context_parallel_size is 2"),
        ({}, {}, {"worker_cls": "my.Worker"}, {}, "remove --worker-cls"),
        ({"spec_tokens": 3}, {}, {}, {}, "mutually exclusive"),
    ],
)
def test_impossible_combinations_are_refused(
    args: dict[str, Any],
    model: dict[str, Any],
    parallel: dict[str, Any],
    environment: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = {"method": "dyspec", "num_speculative_tokens": 4}
    with pytest.raises(OptionError, match=message):
        translate(engine_args(config, **args), model_config(**model), parallel_config(**parallel))


def test_the_placeholder_cannot_be_named_by_hand() -> None:
    with pytest.raises(OptionError, match="cannot be named"):
        translated({"method": "custom_class", "model": PLACEHOLDER_CLASS})


def test_two_problems_are_reported_together() -> None:
    with pytest.raises(OptionError, match=r"pipeline_parallel_size.*recurrent"):
        translate(
            engine_args({"method": "dyspec"}),
            model_config(is_hybrid=True),
            parallel_config(pipeline_parallel_size=2),
        )
