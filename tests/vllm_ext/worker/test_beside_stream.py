# SPDX-License-Identifier: Apache-2.0
"""Drafting on a stream of its own: what waits for what, told by a stand-in for CUDA."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from vllm_ext.worker import beside_stream
from vllm_ext.worker.beside_stream import BesideStream, why_not_on_stream

DEVICE = torch.device("cuda", 1)


class Cuda:
    """Notes every call, and in which thread it was made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self._current = threading.local()
        cuda = self

        class Event:
            def record(self, stream: Any) -> None:
                cuda.note("record", stream.name)

        class Stream:
            def __init__(self, device: torch.device, name: str = "side") -> None:
                assert device == DEVICE
                self.name = name

            def wait_event(self, event: Event) -> None:
                assert isinstance(event, Event)
                cuda.note("wait", self.name)

            def synchronize(self) -> None:
                cuda.note("synchronize", self.name)

        @contextmanager
        def stream(entered: Stream) -> Iterator[None]:
            before = self.current
            self._current.stream = entered.name
            yield
            self._current.stream = before

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda at: Stream(at, self.current))
        monkeypatch.setattr(torch.cuda, "set_device", lambda at: self.note("device", str(at)))

    @property
    def current(self) -> str:
        """Of the calling thread."""
        return getattr(self._current, "stream", "main")

    def note(self, what: str, of: str) -> None:
        beside = threading.current_thread().name.startswith("vllm-ext-draft")
        self.calls.append(f"{'draft' if beside else 'target'}: {what} {of}")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


def test_a_job_follows_what_was_launched_before_and_has_ended_when_it_is_done(cuda: Cuda) -> None:
    place = BesideStream(DEVICE)

    def job() -> str:
        cuda.note("launch on", cuda.current)
        return "drafted"

    for _ in range(2):
        assert place.submit(job).result(10) == "drafted"
    once = [
        "target: record main",
        "draft: wait side",
        "draft: launch on side",
        "draft: synchronize side",
    ]
    assert [call for call in cuda.calls if "device" not in call] == 2 * once
    # The device is the thread's own, and chosen once.
    assert [call for call in cuda.calls if "device" in call] == [f"draft: device {DEVICE}"]


def test_a_job_that_raises_has_ended_too(cuda: Cuda) -> None:
    def broken() -> None:
        raise RuntimeError("the draft broke")

    with pytest.raises(RuntimeError, match="the draft broke"):
        BesideStream(DEVICE).submit(broken).result(10)
    assert cuda.calls[-1] == "draft: synchronize side"


def test_the_target_is_waited_for_on_its_own_stream(cuda: Cuda) -> None:
    BesideStream(DEVICE).finish()
    assert cuda.calls == ["target: synchronize main"]


def attention(module: str, name: str) -> type:
    """An implementation of vLLM's, or of ours."""
    return type(getattr(pytest.importorskip(module), name).__name__, (), {})


@pytest.mark.parametrize(
    ("kind", "module", "attends", "named"),
    [
        ("X", "vllm.v1.attention.backends.flash_attn", "FlashAttentionImpl", None),
        ("X", "vllm.v1.attention.backends.triton_attn", "TritonAttentionImpl", None),
        ("X", "vllm.model_executor.layers.attention.mla_attention", "MLACommonImpl", "MLA"),
        ("FusedMoE", None, None, "MoE"),
    ],
)
def test_layers_with_one_workspace_per_process(
    kind: str, module: str | None, attends: str | None, named: str | None
) -> None:
    layer: Any = type(kind, (torch.nn.Module,), {})()
    if module is not None and attends is not None:
        layer.impl = attention(module, attends)()
    reason = why_not_on_stream(torch.nn.Sequential(torch.nn.Linear(2, 2), layer))
    assert (reason is None) == (named is None)
    assert named is None or (reason is not None and named in reason and "layer 1" in reason)


def test_flashinfer_has_one_workspace_per_process() -> None:
    """By the name that vLLM gives its implementation, which needs the package to be imported."""
    source = importlib.util.find_spec("vllm.v1.attention.backends.flashinfer")
    assert source is not None
    assert source.origin is not None
    assert "class FlashInferImpl(" in Path(source.origin).read_text()
    layer: Any = torch.nn.Module()
    layer.impl = type("FlashInferImpl", (), {})()
    assert "FlashInferImpl" in str(why_not_on_stream(layer))


def test_quantized_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Linear(torch.nn.Module):
        def __init__(self, method: object) -> None:
            super().__init__()
            self.quant_method = method

    monkeypatch.setattr(beside_stream, "LinearBase", Linear)
    plain = UnquantizedLinearMethod()
    assert why_not_on_stream(torch.nn.Sequential(Linear(plain))) is None
    assert "quantized (object)" in str(why_not_on_stream(torch.nn.Sequential(Linear(object()))))
