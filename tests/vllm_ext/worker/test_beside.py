# SPDX-License-Identifier: Apache-2.0
"""Two threads, two forward contexts; a thread on a core of its own; layers that may run in it."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

forward_context = pytest.importorskip("vllm.forward_context")

from vllm import _custom_ops  # noqa: E402

from vllm_ext.worker import beside  # noqa: E402


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Contexts without a configuration."""
    calls: list[dict[str, Any]] = []

    def create(metadata: Any, config: Any, **keys: Any) -> Any:
        calls.append({"metadata": metadata, "config": config, **keys})
        return SimpleNamespace(attn_metadata=metadata)

    monkeypatch.setattr(beside, "create_forward_context", create)
    return calls


def seen() -> Any:
    return forward_context.get_forward_context().attn_metadata


def test_each_thread_sees_its_own_context(made: list[dict[str, Any]]) -> None:
    inside, done = threading.Event(), threading.Event()
    found: list[Any] = []

    def draft() -> None:
        found.append(seen())
        with beside.own_context("config", {"layer": "mine"}, {"layer": 1}):
            found.append(seen())
            inside.set()
            done.wait(10)
            found.append(seen())
        found.append(seen())

    shared = SimpleNamespace(attn_metadata="target's", count=0)
    with forward_context.override_forward_context(shared), beside.per_thread_context():
        thread = threading.Thread(target=draft)
        thread.start()
        assert inside.wait(10)
        assert seen() == "target's"
        forward_context.get_forward_context().count = 3
        done.set()
        thread.join()
        assert seen() == "target's"
    assert found == ["target's", {"layer": "mine"}, {"layer": "mine"}, "target's"]
    assert shared.count == 3
    assert made == [
        {
            "metadata": {"layer": "mine"},
            "config": "config",
            "slot_mapping": {"layer": 1},
            "skip_compiled": True,
        }
    ]
    assert not forward_context.is_forward_context_available()


def test_an_error_leaves_no_context_behind(made: list[dict[str, Any]]) -> None:
    shared = SimpleNamespace(attn_metadata="target's")
    with forward_context.override_forward_context(shared), beside.per_thread_context():
        with pytest.raises(RuntimeError, match="broken"), beside.own_context(None, {}, {}):
            raise RuntimeError("broken")
        assert seen() == "target's"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_the_thread_stays_on_its_core() -> None:
    before = os.sched_getaffinity(0)
    thread = beside.BesideThread(max(before))

    def work() -> set[int]:
        torch.randn(300, 300) @ torch.randn(300, 300)
        torch.randn(1 << 18).sum()
        return os.sched_getaffinity(0)

    assert thread.submit(work).result(30) == {max(before)}
    assert os.sched_getaffinity(0) == before
    assert thread.submit(torch.get_num_threads).result(30) == 1


def test_free_cores_are_those_of_nobody() -> None:
    mine = os.sched_getaffinity(0)
    other = max(mine) + 1
    assert beside.free_cores(mine) == set()
    assert beside.free_cores({*mine, other}) == {other}


def test_layers_are_loaded_without_shared_buffers_and_only_then() -> None:
    before = _custom_ops._supports_onednn

    def load() -> None:
        with beside.reentrant_layers():
            assert _custom_ops._supports_onednn is False
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        load()
    assert _custom_ops._supports_onednn is before


class _FusedMoE(torch.nn.Module):
    pass


def test_models_that_share_buffers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ext.attention.cpu import TreeCPUAttentionBackendImpl

    class Linear(torch.nn.Module):
        def __init__(self, method: Any) -> None:
            super().__init__()
            self.quant_method = method

    class Plain:
        pass

    monkeypatch.setattr(beside, "LinearBase", Linear)
    monkeypatch.setattr(beside, "UnquantizedLinearMethod", Plain)

    def attention(**changes: Any) -> torch.nn.Module:
        impl = object.__new__(TreeCPUAttentionBackendImpl)
        wanted = {"attn_type": "decoder", "alibi_slopes": None, "sinks": None}
        rest = {"logits_soft_cap": 0, "is_fp8_kv_cache": False}
        for name, value in {**wanted, **rest, **changes}.items():
            setattr(impl, name, value)
        layer = torch.nn.Module()
        layer.impl = impl
        return layer

    def why(layer: torch.nn.Module) -> str | None:
        return beside.why_not_reentrant(torch.nn.Sequential(Linear(Plain()), layer))

    assert why(attention()) is None
    assert "quantized (object)" in str(why(Linear(object())))
    assert "experts" in str(why(_FusedMoE()))
    assert "sinks" in str(why(attention(sinks=1)))
    foreign = torch.nn.Module()
    foreign.impl = object()
    assert "attends by object" in str(why(foreign))


def test_code_that_is_exchanged_while_the_target_runs() -> None:
    class Model(torch.nn.Module):
        _compiled_bytecode: Any = None

    class Other(Model):
        pass

    target = torch.nn.Sequential(Model())
    assert beside.why_not_one_code(torch.nn.Sequential(Model()), target) is None
    target[0]._compiled_bytecode = compile("0", "target", "eval")
    assert "Model while" in str(beside.why_not_one_code(torch.nn.Sequential(Model()), target))
    assert beside.why_not_one_code(torch.nn.Sequential(Other()), target) is None


class _Layer(torch.nn.Module):
    """As vLLM leaves a linear layer whose product is torch's."""

    def __init__(self, weight: torch.Tensor, method: Any, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = torch.nn.Parameter(torch.ones(len(weight)).to(weight)) if bias else None
        self.quant_method = method
        self.cpu_linear: Any = torch.nn.functional.linear


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_laid_out_once(dtype: torch.dtype) -> None:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((48, 32), generator=generator).to(dtype)
    method = UnquantizedLinearMethod()
    layers = [
        _Layer(weight, method),
        _Layer(weight, UnquantizedEmbeddingMethod(), bias=True),
        _Layer(torch.empty(0, dtype=dtype), method),  # vLLM has packed it
        _Layer(weight, None),
    ]
    beside.lay_out(torch.nn.ModuleList(layers))
    changed = [layer.cpu_linear is not torch.nn.functional.linear for layer in layers]
    assert changed == [True, True, False, False]
    for rows in (1, 5):
        x = torch.randn((rows, 32), generator=generator).to(dtype)
        for layer in layers[:2]:
            found = layer.cpu_linear(x, layer.weight, layer.bias)
            wanted = torch.nn.functional.linear(x, weight, layer.bias)
            torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
