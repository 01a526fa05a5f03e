# SPDX-License-Identifier: Apache-2.0
"""FlashAttention over the contexts of trees, with a torch stand-in where vLLM has none."""

from __future__ import annotations

import ast
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from proposers.tree import TokenTree
from tests.vllm_ext.attention.flash_standin import flash_attn_varlen_func
from tests.vllm_ext.attention.gpu_layer import make_layer
from tests.vllm_ext.attention.test_cuda import CHAIN, RUNNER, TREE, batch, forward, source_of
from vllm_ext.attention import flash_context
from vllm_ext.attention.cuda_selftest import trees_test
from vllm_ext.attention.flash_context import PARAMETERS, why_no_flash_context
from vllm_ext.attention.route import ALWAYS, Route
from vllm_ext.attention.tree_launch import ROUTE_ATTRIBUTE


@pytest.fixture
def calls(monkeypatch: Any) -> list[dict[str, Any]]:
    """What FlashAttention is called with from now on."""
    made: list[dict[str, Any]] = []

    def flash(**given: Any) -> Any:
        made.append(given)
        return flash_attn_varlen_func(**given)

    monkeypatch.setattr(flash_context, "flash_attention", lambda: flash)
    return made


def flash_layer(route: Route | None = ALWAYS, **kind: Any) -> Any:
    layer = make_layer(**kind)
    layer.impl.vllm_flash_attn_version = 3
    setattr(layer.impl, ROUTE_ATTRIBUTE, route)
    return layer


@pytest.mark.interpreter
def test_both_routes_give_the_same(calls: list[Any]) -> None:
    layer = flash_layer()
    made = batch(layer, [CHAIN, TREE, TokenTree.EMPTY])
    apart = forward(layer, made)
    (given,) = calls
    assert set(given) == set(PARAMETERS)
    setattr(layer.impl, ROUTE_ATTRIBUTE, None)
    together = forward(layer, made)
    assert len(calls) == 1
    assert not apart.isnan().any()
    assert torch.allclose(apart, together, atol=1e-5)


@pytest.mark.interpreter
def test_padding_is_left_out(calls: list[Any]) -> None:
    layer = flash_layer()
    made = batch(layer, [TREE, CHAIN])
    expected = forward(layer, made)
    padding = made.query.new_full((5, *made.query.shape[1:]), float("nan"))
    made.query = torch.cat([made.query, padding])
    padded = forward(layer, made)
    assert [len(given["q"]) for given in calls] == [8, 8]
    assert torch.equal(padded[:8], expected)
    assert padded[8:].isnan().all()


@pytest.mark.interpreter
def test_short_contexts_stay_with_the_tree_kernel(calls: list[Any]) -> None:
    layer = flash_layer(Route(((1, 27.5),)))
    forward(layer, batch(layer, [TREE, TREE]))  # contexts of 20 and 27
    assert not calls
    forward(layer, batch(layer, [TREE, TREE, TREE]))  # and of 34: 27 in the mean
    assert not calls
    forward(layer, batch(layer, [TREE, TREE, TREE, TREE]))
    assert len(calls) == 1


@pytest.mark.interpreter
def test_a_step_with_prompt_chunks_stays_with_the_tree_kernel(calls: list[Any]) -> None:
    """Rows of prompt chunks are no rows of the launch, and FlashAttention knows no gaps."""
    layer = flash_layer()
    forward(layer, batch(layer, [TREE, 130]))
    assert not calls


@pytest.mark.interpreter
@pytest.mark.parametrize("broken", ["context", "lse", "scale"])
def test_the_self_test_sees_a_wrong_context(monkeypatch: Any, broken: str) -> None:
    def flash(**given: Any) -> Any:
        if broken == "context":
            given["seqused_k"] = given["seqused_k"] - 1
            given["max_seqlen_k"] -= 1
        elif broken == "scale":
            given["softmax_scale"] *= 1.1
        attended, lse = flash_attn_varlen_func(**given)
        return attended, lse * (1.05 if broken == "lse" else 1.0)

    layer = flash_layer()
    monkeypatch.setattr(flash_context, "flash_attention", lambda: flash_attn_varlen_func)
    assert trees_test(layer, RUNNER) is None
    monkeypatch.setattr(flash_context, "flash_attention", lambda: flash)
    assert "dense masked" in str(trees_test(layer, RUNNER))


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("vllm_flash_attn_version", None, "not FlashAttention"),
        ("vllm_flash_attn_version", 4, "not FlashAttention"),
        ("kv_cache_dtype", "fp8", "type fp8"),
        ("sliding_window", (63, 0), "sliding window"),
    ],
)
def test_layers_whose_contexts_it_cannot_read(
    calls: list[Any], attribute: str, value: Any, reason: str
) -> None:
    layer = flash_layer()
    assert why_no_flash_context(layer.impl) is None
    setattr(layer.impl, attribute, value)
    assert reason in str(why_no_flash_context(layer.impl))


def test_an_engine_that_asked_for_batch_invariance(calls: list[Any], monkeypatch: Any) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert "invariance" in str(why_no_flash_context(flash_layer().impl))


def test_without_flash_attention() -> None:
    if flash_context.flash_attention() is not None:
        pytest.skip("it is here")
    assert "not FlashAttention" in str(why_no_flash_context(flash_layer().impl))


@pytest.mark.parametrize(
    ("function", "taken"),
    [(flash_attn_varlen_func, True), (lambda q, k, v, **more: None, False)],
)
def test_a_function_that_takes_other_arguments_is_not_called(
    monkeypatch: Any, function: Any, taken: bool
) -> None:
    module = SimpleNamespace(flash_attn_varlen_func=function)
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", module)
    found = flash_context.flash_attention.__wrapped__()  # what is remembered stays as it is
    assert (found is function) == taken
    assert (found is None) != taken


# -- drift, read as source where it cannot be imported ----------------------------------------


def test_flash_attention_takes_what_we_pass() -> None:
    tree = ast.parse(source_of("vllm.vllm_flash_attn.flash_attn_interface"))
    functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    found = functions["flash_attn_varlen_func"].args
    names = [argument.arg for argument in found.args]
    assert set(PARAMETERS) <= set(names)
    required = set(names[: len(names) - len(found.defaults)])
    assert required <= set(PARAMETERS)
    docs = ast.get_docstring(functions["flash_attn_varlen_func"]) or ""
    assert "(nheads, total_q_seqlen)" in docs


def test_vllm_itself_asks_for_a_context_as_we_do() -> None:
    """Where a context is spread over ranks; and the version is an attribute of the layer."""
    source = source_of("vllm.v1.attention.backends.flash_attn")
    assert "self.vllm_flash_attn_version = get_flash_attn_version(" in source
    before, _, after = source.partition("context_attn_out, context_lse = flash_attn_varlen_func(")
    call = after.partition("\n            )")[0]
    assert before
    for given in ("q=", "k=key_cache", "v=value_cache", "out=", "cu_seqlens_q=", "max_seqlen_q="):
        assert given in call
    for given in ("seqused_k=", "max_seqlen_k=", "causal=False", "block_table=", "softcap="):
        assert given in call
    assert "return_softmax_lse=True" in call
