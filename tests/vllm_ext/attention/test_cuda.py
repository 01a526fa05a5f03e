# SPDX-License-Identifier: Apache-2.0
"""Our subclasses of CUDA attention backends, around a stock one that runs on a CPU."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backends import registry
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from proposers.tree import TokenTree
from tests.vllm_ext.attention.gpu_layer import (
    DEVICE,
    HEAD,
    HEADS,
    KV_HEADS,
    PAGE,
    StockBackend,
    StockBuilder,
    StockImpl,
    make_layer,
)
from vllm_ext.attention import cuda, cuda_selftest, cuda_setup
from vllm_ext.attention.cuda_selftest import scratch_like, self_test
from vllm_ext.worker.step import STEP_ATTRIBUTE, build_step

RUNNER = SimpleNamespace(dtype=torch.float32)
TREE = TokenTree((5, 6, 7, 8), (-1, -1, 0, 1), (0.5,) * 4)
CHAIN = TokenTree((5, 6), (-1, 0), (0.5,) * 2)


def batch(layer: Any, drafts: list[TokenTree | int]) -> SimpleNamespace:
    """A step whose requests have a draft each, or a prompt chunk of so many rows."""
    torch.manual_seed(0)
    sizes = [d if isinstance(d, int) else len(d) + 1 for d in drafts]
    bases = np.array([20 + 7 * i for i in range(len(drafts))], dtype=np.int32)
    starts = np.cumsum([0, *sizes]).astype(np.int32)
    trees = {f"r{i}": d for i, d in enumerate(drafts) if not isinstance(d, int)}
    ids = [f"r{i}" for i in range(len(drafts))]
    step = build_step(ids, {r: t.tokens for r, t in trees.items()}, trees, starts, bases)
    if step.attention is not None:
        step.attention.rows = step.attention.rows.to(DEVICE)
    pages = [-(-(int(b) + s) // PAGE) for b, s in zip(bases, sizes, strict=True)]
    table = torch.zeros((len(drafts), max(pages)), dtype=torch.int32, device=DEVICE)
    order = 1 + torch.randperm(sum(pages)).to(DEVICE)
    cache = torch.full((sum(pages) + 1, KV_HEADS, PAGE, 2 * HEAD), float("nan"), device=DEVICE)
    rows = []
    for i, (base, size) in enumerate(zip(bases.tolist(), sizes, strict=True)):
        table[i, : pages[i]] = order[sum(pages[:i]) : sum(pages[: i + 1])]
        slot = torch.arange(base + size, device=DEVICE)
        slots = table[i].long()[slot // PAGE] * PAGE + slot % PAGE
        fresh = torch.randn(2, base + size, KV_HEADS, HEAD).to(DEVICE)
        layer.impl.do_kv_cache_update(layer, fresh[0], fresh[1], cache, slots)
        rows.append(fresh[:, base:])
    keys, values = torch.cat(rows, dim=1)
    lengths = torch.from_numpy(bases) + torch.tensor(sizes)
    metadata = SimpleNamespace(
        query_start_loc=torch.from_numpy(starts), seq_lens=lengths, block_table=table
    )
    query = torch.randn(int(starts[-1]), HEADS, HEAD).to(DEVICE)
    return SimpleNamespace(
        step=step,
        starts=starts,
        bases=bases,
        table=table,
        cache=cache,
        keys=keys,
        values=values,
        metadata=metadata,
        query=query,
    )


def forward(layer: Any, made: SimpleNamespace) -> torch.Tensor:
    """One layer's forward as in the engine, on poisoned output."""
    from vllm_ext.attention.tree_launch import LAUNCH_ATTRIBUTE, DeviceStep, TreeLaunch

    metadata = SimpleNamespace(**vars(made.metadata))
    if made.step.attention is not None:
        device_step = DeviceStep.build(made.step, made.starts, made.bases, processors=2)
        setattr(metadata, STEP_ATTRIBUTE, made.step.attention)
        setattr(metadata, LAUNCH_ATTRIBUTE, TreeLaunch(device_step, made.table))
    output = torch.full_like(made.query, float("nan"))
    layer.impl.forward(
        layer, made.query, made.keys, made.values, made.cache, metadata, output=output
    )
    return output


def stock(layer: Any, made: SimpleNamespace) -> torch.Tensor:
    output = torch.empty_like(made.query)
    StockImpl.forward(
        layer.impl, layer, made.query, made.keys, made.values, made.cache, made.metadata, output
    )
    return output


def test_a_step_without_branches_is_the_stock_kernels() -> None:
    layer = make_layer()
    made = batch(layer, [CHAIN, TokenTree.EMPTY, 9])
    assert made.step.attention is None
    assert torch.equal(forward(layer, made), stock(layer, made))


@pytest.mark.interpreter
def test_decoding_requests_ride_in_one_launch() -> None:
    layer = make_layer()
    made = batch(layer, [CHAIN, TREE, TokenTree.EMPTY])
    ours, theirs = forward(layer, made), stock(layer, made)
    assert layer.impl.calls == 1  # by stock() above
    branching = slice(3, 8)
    others = [0, 1, 2, 8]
    assert torch.allclose(ours[others], theirs[others], atol=1e-5)
    assert torch.allclose(ours[branching][:2], theirs[branching][:2], atol=1e-5)  # root and node 0
    assert not torch.allclose(ours[branching], theirs[branching], atol=1e-3)
    keys, values = made.step.attention.stash["layer"]
    assert torch.equal(keys, made.keys[branching])
    assert torch.equal(values, made.values[branching])


@pytest.mark.interpreter
def test_prompt_chunks_stay_on_the_stock_kernel() -> None:
    layer = make_layer()
    made = batch(layer, [9, TREE, 130])
    ours, theirs = forward(layer, made), stock(layer, made)
    assert layer.impl.calls == 2
    chunks = [*range(9), *range(14, 144)]
    assert torch.equal(ours[chunks], theirs[chunks])
    assert not torch.allclose(ours[9:14], theirs[9:14], atol=1e-3)
    assert not ours.isnan().any()


@pytest.mark.interpreter
def test_self_test_passes_with_a_window() -> None:
    assert self_test(make_layer(window=40), StockBuilder(), RUNNER) is None


@pytest.mark.interpreter
def test_self_test_sees_a_wrong_layout(monkeypatch: Any) -> None:
    from vllm_ext.attention import tree_launch

    real = tree_launch.key_value_views
    monkeypatch.setattr(tree_launch, "key_value_views", lambda *args: tuple(reversed(real(*args))))
    assert "stock kernel" in str(self_test(make_layer(), StockBuilder(), RUNNER))


@pytest.mark.interpreter
def test_self_test_sees_one_wrong_mask_bit(monkeypatch: Any) -> None:
    from vllm_ext.attention.tree_plan import RowTree

    real = RowTree.build

    def one_bit(*args: Any) -> RowTree:
        tree = real(*args)
        hidden = ~np.tri(len(tree.depths), dtype=bool)
        words = tree.words.copy()
        for row, node in zip(*np.nonzero(~hidden), strict=True):
            if not words[row, 0] >> node & 1:
                words[row, 0] |= 1 << node
                break
        return replace(tree, words=words)

    monkeypatch.setattr(RowTree, "build", one_bit)
    assert "dense masked" in str(self_test(make_layer(), StockBuilder(), RUNNER))


@pytest.mark.interpreter
def test_self_test_sees_a_wrong_scale(monkeypatch: Any) -> None:
    from vllm_ext.attention import tree_launch

    real = tree_launch.tree_attention

    def scaled(*args: Any, **kwargs: Any) -> None:
        real(*args[:7], args[7] * 1.05, *args[8:], **kwargs)

    monkeypatch.setattr(tree_launch, "tree_attention", scaled)
    assert "stock kernel" in str(self_test(make_layer(), StockBuilder(), RUNNER))


def engine(layer: Any, **changed: Any) -> Any:
    """What set-up reads of a runner."""
    group = SimpleNamespace(
        layer_names=["layer"], kernel_block_size=None, get_metadata_builder=StockBuilder
    )
    runner: dict[str, Any] = {
        "dtype": torch.float32,
        "uses_mrope": False,
        "num_spec_tokens": 16,
        "model_config": SimpleNamespace(rswa_window=None),
        "parallel_config": SimpleNamespace(use_ubatching=False),
        "compilation_config": SimpleNamespace(
            static_forward_context={"layer": layer},
            pass_config=SimpleNamespace(fuse_attn_quant=False),
            cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
        ),
        "attn_groups": [[group]],
        **changed,
    }
    return SimpleNamespace(**runner)


@pytest.mark.interpreter
def test_set_up_finds_nothing_to_refuse() -> None:
    assert cuda_setup.set_up_tree_attention(engine(make_layer())) is None


def test_what_set_up_refuses(monkeypatch: Any) -> None:
    monkeypatch.setattr(cuda_selftest, "self_test", lambda *args: None)
    refuse = cuda_setup.set_up_tree_attention
    assert refuse(engine(make_layer())) is None
    assert "M-RoPE" in str(refuse(engine(make_layer(), uses_mrope=True)))
    assert "127" in str(refuse(engine(make_layer(), num_spec_tokens=128)))
    assert refuse(engine(make_layer(), num_spec_tokens=127)) is None
    batching = SimpleNamespace(use_ubatching=True)
    assert "micro-batching" in str(refuse(engine(make_layer(), parallel_config=batching)))
    windows = SimpleNamespace(rswa_window=64)
    assert "sliding" in str(refuse(engine(make_layer(), model_config=windows)))
    full = engine(make_layer())
    full.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
    assert "FULL_AND_PIECEWISE" in str(refuse(full))
    fused = engine(make_layer())
    fused.compilation_config.pass_config.fuse_attn_quant = True
    assert "quantisation" in str(refuse(fused))
    assert "no attention layer" in str(refuse(engine(make_layer(), attn_groups=[[]])))


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("alibi_slopes", torch.ones(4), "ALiBi"),
        ("sinks", torch.ones(4), "sinks"),
        ("kv_cache_dtype", "int8_per_token_head", "KV cache"),
        ("attn_type", "encoder_only", "attention type"),
        ("head_size", 512, "head size"),
        ("chunk_lookback", 2, "chunked"),
    ],
)
def test_layers_that_are_refused(attribute: str, value: Any, reason: str) -> None:
    layer = make_layer()
    setattr(layer.impl, attribute, value)
    assert reason in str(cuda_setup.set_up_tree_attention(engine(layer)))


def test_a_stock_layer_is_refused() -> None:
    layer = make_layer()
    layer.impl = StockImpl()
    assert "attention by StockImpl" in str(cuda_setup.set_up_tree_attention(engine(layer)))


def test_a_failing_self_test_is_a_reason_not_a_crash(monkeypatch: Any) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(cuda_selftest, "self_test", fails)
    assert "out of shared" in str(cuda_setup.set_up_tree_attention(engine(make_layer())))


def test_backends_are_made_by_name_and_registered(monkeypatch: Any) -> None:
    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", {})
    cuda.register_tree_backends()
    for name in ("FLASH_ATTN", "TRITON_ATTN"):  # FlashInfer's library is not installed here
        made = AttentionBackendEnum[name].get_class()
        assert made.get_name() == name
        assert issubclass(made.get_impl_cls(), cuda.TreeAttention)
        module, qualname = made.full_cls_name()  # how the platform hands the class on
        assert getattr(importlib.import_module(module), qualname) is made
    assert AttentionBackendEnum.FLASHINFER.get_path().endswith("cuda.TreeFlashInferBackend")


def test_someone_elses_override_is_left_alone(monkeypatch: Any) -> None:
    theirs = {AttentionBackendEnum.FLASH_ATTN: "somebody.Else"}
    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", theirs)
    cuda.register_tree_backends()
    assert AttentionBackendEnum.FLASH_ATTN.get_path() == "somebody.Else"


def test_a_changed_implementation_stays_stock(monkeypatch: Any) -> None:
    class Changed(StockImpl):
        def forward(self, layer: Any, q: Any, *rest: Any) -> Any:  # type: ignore[override]
            raise NotImplementedError

    monkeypatch.setattr(StockBackend, "get_impl_cls", staticmethod(lambda: Changed))
    assert cuda.tree_backend(StockBackend) is StockBackend


def test_unknown_names_are_no_backends() -> None:
    with pytest.raises(AttributeError, match="TreeNothing"):
        _ = cuda.TreeNothing


# -- drift: the three stock backends, read as source where their libraries are missing ---------


def source_of(module: str) -> str:
    """Source of a module that may not be importable on this machine."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text()


def test_the_cuda_platform_does_what_we_rely_on() -> None:
    source = source_of("vllm.platforms.cuda")
    assert 'worker_cls == "auto"' in source  # a worker that was named stays
    assert "_backend_cls_path(selected_backend_class)" in source  # our class, by its own name
    assert "return backend.get_class()" in source  # with overrides
    opaque = source.partition("def opaque_attention_op(cls) -> bool:")[2].strip()
    assert opaque.startswith("return True")  # attention runs outside the compiled graph


def implementation(module: str, cls: str) -> dict[str, list[str]]:
    """Parameter names of the methods of a class, from its source."""
    tree = ast.parse(source_of(f"vllm.v1.attention.backends.{module}"))
    found = next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == cls)
    return {
        method.name: [argument.arg for argument in method.args.args]
        for method in found.body
        if isinstance(method, ast.FunctionDef)
    }


@pytest.mark.parametrize(
    ("module", "cls"),
    [
        ("flash_attn", "FlashAttentionImpl"),
        ("flashinfer", "FlashInferImpl"),
        ("triton_attn", "TritonAttentionImpl"),
    ],
)
def test_stock_implementations_take_what_we_pass(module: str, cls: str) -> None:
    methods = implementation(module, cls)
    assert methods["forward"][: len(cuda.FORWARD)] == list(cuda.FORWARD)
    writer = ["self", "layer", "key", "value", "kv_cache", "slot_mapping"]
    assert methods["do_kv_cache_update"] == writer
    source = source_of(f"vllm.v1.attention.backends.{module}")
    assert "forward_includes_kv_cache_update: bool = False" in source
    for attribute in (
        "num_heads",
        "num_kv_heads",
        "head_size",
        "scale",
        "alibi_slopes",
        "sliding_window",
        "kv_cache_dtype",
        "logits_soft_cap",
        "kv_sharing_target_layer_name",
    ):
        assert f"self.{attribute} = " in source, attribute
    assert "attn_type != AttentionType.DECODER" in source or "self.attn_type = " in source


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)])
def test_scratch_caches_keep_the_memory_order(order: tuple[int, ...]) -> None:
    shape = [9, KV_HEADS, PAGE, 2 * HEAD]
    stored = torch.zeros([shape[d] for d in order])
    cache = stored.permute([order.index(d) for d in range(4)])
    scratch = scratch_like(cache, 3)
    assert scratch.shape == (3, *cache.shape[1:])
    assert scratch.stride()[1:] == cache.stride()[1:]


def test_scratch_caches_of_five_dimensions() -> None:
    assert scratch_like(torch.zeros(2, 9, PAGE, 3, HEAD), 4).shape == (2, 4, PAGE, 3, HEAD)
    assert scratch_like(torch.zeros(9, 2, PAGE, 3, HEAD), 4).shape == (4, 2, PAGE, 3, HEAD)


@pytest.mark.interpreter
def test_layers_of_one_kind_share_what_a_step_needs(monkeypatch: Any) -> None:
    """Plans and memory are made once per step and kind of layer, views once per cache."""
    from vllm_ext.attention import tree_launch

    made: list[str] = []
    for name in ("plan_launch", "key_value_views"):
        real = getattr(tree_launch, name)

        def counted(*args: Any, real: Any = real, name: str = name, **more: Any) -> Any:
            made.append(name)
            return real(*args, **more)

        monkeypatch.setattr(tree_launch, name, counted)
    layers = [make_layer(), make_layer()]
    step = batch(layers[0], [TREE])
    caches = [step.cache, step.cache.clone()]
    device_step = tree_launch.DeviceStep.build(step.step, step.starts, step.bases, processors=2)
    launch = tree_launch.TreeLaunch(device_step, step.table)
    outputs = [torch.empty_like(step.query) for _ in layers]
    for _ in range(2):
        for layer, cache, output in zip(layers, caches, outputs, strict=True):
            launch.attend(layer.impl, layer, step.query, cache, output)
    assert sorted(made) == ["key_value_views", "key_value_views", "plan_launch"]
    assert torch.equal(*outputs)
    caches[0] = torch.zeros_like(caches[0])  # allocated anew
    launch.attend(layers[0].impl, layers[0], step.query, caches[0], outputs[0])
    assert made.count("key_value_views") == 3
    assert not torch.equal(*outputs)
