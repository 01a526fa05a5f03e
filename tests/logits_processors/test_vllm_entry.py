# SPDX-License-Identifier: Apache-2.0
"""One class that both of vLLM's loaders take, and that breaks no engine that does not use it."""

from __future__ import annotations

import importlib.metadata
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import pytest
import torch
from toy_engine import CPU, ToyV2, config
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample import logits_processor as v1
from vllm.v1.worker.gpu.sample.logits_processor import loader as v2

from logits_processors.limits import OPTIONS_KEY
from logits_processors.vllm_entry import LogitsProcessor
from logits_processors.vllm_v1 import V1Processor
from logits_processors.vllm_v2 import V2Processor

NAME = "logits_processors.vllm_entry:LogitsProcessor"


def only(value: str) -> Any:
    def entry_points(**selection: str) -> EntryPoints:
        return EntryPoints([EntryPoint("ours", value, "vllm.logits_processors")]).select(
            **selection
        )

    return entry_points


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", only(NAME))
    monkeypatch.setattr(v2, "entry_points", only(NAME))


@pytest.mark.usefixtures("installed")
def test_both_loaders_take_the_entry_point() -> None:
    assert v1._load_logitsprocs_plugins() == [LogitsProcessor]
    assert v2._load_v2_logitsprocs_plugins() == [LogitsProcessor]


def test_a_class_of_one_kind_would_stop_the_other_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(v2, "entry_points", only("logits_processors.vllm_v1:V1Processor"))
    with pytest.raises(ValueError, match="not a subclass"):
        v2._load_v2_logitsprocs_plugins()


def test_both_loaders_take_the_name_and_the_class() -> None:
    for given in (NAME, LogitsProcessor):
        assert v1._load_logitsprocs_by_fqcns([given]) == [LogitsProcessor]
        assert v2._load_v2_logitsprocs_by_fqcns([given]) == [LogitsProcessor]


@pytest.mark.usefixtures("installed")
def test_each_runner_gets_its_adaptor() -> None:
    built = v1.build_logitsprocs(config(), CPU, False, False)
    assert [type(p) for p in built.non_argmax_invariant][-1] is V1Processor
    assert type(LogitsProcessor(config(), ToyV2().states)) is V2Processor


@pytest.mark.parametrize("options", [None, {}, {"others": 1}, object()])
def test_engines_that_set_no_options_start(options: Any) -> None:
    LogitsProcessor(config(additional_config=options), CPU, False)


def test_without_admission_our_requests_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LogitsProcessor, "admission", False)
    constrained = SamplingParams(extra_args={"constraint_regex": "a"})
    for harmless in (None, {}, {"other": 1}, {1: 2}):
        LogitsProcessor.validate_params(SamplingParams(extra_args=harmless))
    with pytest.raises(VLLMValidationError, match="VLLM_PLUGINS"):
        LogitsProcessor.validate_params(constrained)
    monkeypatch.setattr(LogitsProcessor, "admission", True)
    LogitsProcessor.validate_params(constrained)
    with pytest.raises(VLLMValidationError, match="min_p"):
        LogitsProcessor.validate_params(
            SamplingParams(extra_args={"constraint_regex": "a"}, min_p=0.5)
        )


@pytest.mark.parametrize("value", ["1", "true"])
def test_switched_off_it_does_nothing(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("VLLM_EXT_DISABLE", value)
    broken = config(additional_config={OPTIONS_KEY: "nonsense"})
    v1_made: Any = LogitsProcessor(broken, CPU, False)
    assert isinstance(v1_made, v1.LogitsProcessor)
    assert v1_made.is_argmax_invariant()
    constrained = SamplingParams(extra_args={"constraint_regex": "a"})
    logits = torch.zeros(1, 5)
    v1_made.update_state(v1.BatchUpdate(1, [], [(0, constrained, [1], [])], []))
    assert v1_made.apply(logits) is logits
    v2_made: Any = LogitsProcessor(broken, ToyV2().states)
    assert not v2_made.add_request(0, constrained)
    assert v2_made.apply(logits, None) is logits
    assert not logits.any()
    monkeypatch.setattr(LogitsProcessor, "admission", True)
    LogitsProcessor.validate_params(SamplingParams(extra_args={"other": 1}))
    with pytest.raises(VLLMValidationError, match="unset VLLM_EXT_DISABLE"):
        LogitsProcessor.validate_params(constrained)


@pytest.mark.parametrize("value", ["", "0"])
def test_switched_on_it_works(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """Negative control of the test above."""
    monkeypatch.setenv("VLLM_EXT_DISABLE", value)
    assert type(LogitsProcessor(config(), CPU, False)) is V1Processor
    with pytest.raises(ValueError, match=OPTIONS_KEY):
        LogitsProcessor(config(additional_config={OPTIONS_KEY: "nonsense"}), CPU, False)
