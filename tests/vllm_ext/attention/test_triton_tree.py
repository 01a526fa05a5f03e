# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel against float64 dense masked attention: in the interpreter, or on a GPU."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proposers.tree import TokenTree
from tests.vllm_ext.attention.dense import Case, relative_error

pytestmark = pytest.mark.interpreter

EXACT = 1e-5  # relative error in float32
GUARD = 1024.0  # far from any output
INTERPRETED = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_tree(nodes: int, seed: int) -> TokenTree:
    rng = np.random.default_rng(seed)
    parents = tuple(int(rng.integers(-1, node)) for node in range(nodes))
    return TokenTree(tuple(range(nodes)), parents, (0.5,) * nodes)


def attend(
    case: Case, chunk: int | None = None, plan: Any = None, context: Any = None
) -> torch.Tensor:
    """Run the kernel on NaN-poisoned output that lies inside a guarded buffer."""
    from vllm_ext.attention.triton_tree import Context, tree_attention

    tile, made = make_plan(case, chunk, context is None)
    rows, heads, size = case.query.shape
    guarded = torch.full(
        (rows + 2, heads + 1, size + 16), GUARD, dtype=case.dtype, device=case.device
    )
    output = guarded[1:-1, :heads, :size].fill_(float("nan"))
    scales = [torch.tensor([s], device=case.device) for s in case.scales or ()]
    tree_attention(
        case.query,
        case.keys,
        case.values,
        case.table,
        plan or made,
        tile,
        output,
        case.scale,
        case.window,
        case.soft_cap,
        query_scale=scales[0] if scales else None,
        kv_scales=(scales[1], scales[2]) if scales else None,
        context=Context(*context) if context else None,
    )
    assert (guarded == GUARD).sum() == guarded.numel() - output.numel()
    return output.clone()


def make_plan(case: Case, chunk: int | None = None, context: bool = True) -> Any:
    from vllm_ext.attention.tree_plan import plan_launch
    from vllm_ext.attention.triton_tree import choose_tile

    group = case.heads // case.kv_heads
    most = max(len(row.depths) for row in case.rows)
    tile = choose_tile(most, group, case.head_size, case.dtype)
    return tile, plan_launch(
        case.rows,
        group,
        case.kv_heads,
        case.window,
        tile.block_m,
        tile.block_n,
        processors=1,
        device=torch.device(case.device),
        chunk=chunk,
        context=context,
    )


def check(case: Case, chunk: int | None = None, tolerance: float = EXACT) -> None:
    expected = case.expected()
    before = case.cache.clone().view(torch.uint8)
    output = attend(case, chunk)
    assert relative_error(output, expected) < tolerance
    # Written: every element of the trees' rows, and nothing else.
    assert torch.equal(output.cpu().isnan(), expected.isnan())
    assert torch.equal(case.cache.view(torch.uint8), before)


@st.composite
def cases(draw: Any) -> tuple[Case, int | None]:
    count = draw(st.integers(1, 3))
    trees = []
    for _ in range(count):
        nodes = draw(st.one_of(st.just(0), st.integers(1, 9), st.integers(10, 40)))
        trees.append((draw(st.integers(0, 90)), random_tree(nodes, draw(st.integers(0, 10**6)))))
    group = draw(st.sampled_from([1, 2, 3, 4, 7]))
    kv_heads = draw(st.sampled_from([1, 2]))
    case = Case(
        trees,
        heads=group * kv_heads,
        kv_heads=kv_heads,
        head_size=draw(st.sampled_from([64, 80, 96, 128])),
        page=draw(st.sampled_from([16, 32, 48])),
        window=draw(st.sampled_from([-1, -1, 1, 5, 33])),
        soft_cap=draw(st.sampled_from([0.0, 0.0, 1.5])),
        layout=draw(st.sampled_from(["BHN2D", "BNH2D", "2BNHD", "B2NHD"])),
        gap=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 10**6)),
        device=DEVICE,
    )
    return case, draw(st.sampled_from([None, None, 16, 48]))


@settings(INTERPRETED, max_examples=60)
@given(cases())
def test_equals_dense_attention(drawn: tuple[Case, int | None]) -> None:
    check(*drawn)


@settings(INTERPRETED, max_examples=20)
@given(cases())
def test_goes_on_from_a_context_that_was_attended_elsewhere(
    drawn: tuple[Case, int | None],
) -> None:
    case, _ = drawn
    case.window = -1
    expected = case.expected()
    context = case.context()
    before = case.cache.clone().view(torch.uint8)
    for row in case.rows:  # of the contexts nothing is read any more
        slot = torch.arange(row.base, device=case.device)
        block = case.table[row.request].long()[slot // case.page]
        case.keys[block, slot % case.page] = float("nan")
        case.values[block, slot % case.page] = float("nan")
    poisoned = case.cache.clone().view(torch.uint8)
    output = attend(case, context=context)
    assert relative_error(output, expected) < EXACT
    assert torch.equal(output.cpu().isnan(), expected.isnan())
    assert torch.equal(case.cache.view(torch.uint8), poisoned)
    assert any(row.base for row in case.rows) != torch.equal(before, poisoned)


def test_a_context_in_the_dtype_of_the_model() -> None:
    case = Case(
        [(50, random_tree(20, 1)), (0, random_tree(3, 2))], dtype=torch.bfloat16, device=DEVICE
    )
    expected = case.expected()
    assert relative_error(attend(case, context=case.context()), expected) < 2e-2


@pytest.mark.parametrize("broken", ["lse in another base", "lse of another row", "no context"])
def test_a_wrong_context_is_seen(broken: str) -> None:
    case = sample_case()
    expected = case.expected()
    attended, lse = case.context()
    assert relative_error(attend(case, context=(attended, lse)), expected) < EXACT
    if broken == "lse in another base":
        lse = lse / np.log(2.0)
    elif broken == "lse of another row":
        lse = lse.roll(1, dims=1)
    else:
        attended = torch.zeros_like(attended)
    assert relative_error(attend(case, context=(attended, lse)), expected) > 1e-2


@pytest.mark.parametrize("nodes", [63, 64, 127])
def test_both_ancestor_words(nodes: int) -> None:
    """Rows 63, 64 and 127 sit at the ends of the words; the deepest chain sets their sign bits."""
    chain = TokenTree.chain(range(nodes), [0.5] * nodes)
    check(Case([(5, random_tree(nodes, 1)), (3, chain)], heads=1, kv_heads=1, device=DEVICE))


def test_long_context_is_split_by_the_plan_itself() -> None:
    case = Case([(700, random_tree(6, 0)), (20, random_tree(3, 1))], 2, 1, device=DEVICE)
    _, plan = make_plan(case)
    assert plan.trees[0, 7] > 1
    assert plan.trees[1, 7] == 1
    check(case)


@pytest.mark.parametrize("head_size", [192, 256])
def test_wide_heads(head_size: int) -> None:
    check(Case([(33, random_tree(9, 2))], 2, 1, head_size=head_size, device=DEVICE))


@pytest.mark.parametrize(
    ("dtype", "stored", "tolerance"),
    [
        (torch.bfloat16, None, 2e-2),
        (torch.float16, None, 2e-3),
        (torch.bfloat16, torch.float8_e4m3fn, 2e-2),
        (torch.float16, torch.float8_e5m2, 2e-3),
        (torch.float32, torch.float8_e4m3fn, EXACT),
    ],
    ids=str,
)
def test_dtypes(dtype: torch.dtype, stored: torch.dtype | None, tolerance: float) -> None:
    scales = (1.0, 0.5, 2.0) if stored is not None else None
    case = Case(
        [(40, random_tree(9, 3)), (7, TokenTree.EMPTY)],
        dtype=dtype,
        cache_dtype=stored,
        scales=scales,
        device=DEVICE,
    )
    check(case, tolerance=tolerance)


def test_float8_queries_have_a_scale() -> None:
    case = Case([(40, random_tree(9, 3))], cache_dtype=torch.float8_e4m3fn, device=DEVICE)
    case.scales = (0.25, 0.5, 2.0)
    case.query = case.query.to(torch.float8_e4m3fn)
    case.dtype = torch.float32  # of the output
    check(case)


# -- mutations: each breaks one thing, and the comparison must see it --------------------------


def broken_error(case: Case, chunk: int | None = None, plan: Any = None) -> float:
    return relative_error(attend(case, chunk, plan), case.expected())


def sample_case() -> Case:
    return Case([(37, random_tree(9, 5))], heads=2, kv_heads=1, seed=4, device=DEVICE)


def test_one_wrong_ancestor_bit_is_seen() -> None:
    for row, bit in itertools.product((3, 9), (0, 2, 9)):
        case = sample_case()
        words = case.rows[0].words.copy()
        words[row, 0] ^= np.int64(1) << np.int64(bit)
        case.rows = [replace(case.rows[0], words=words)]
        assert broken_error(case) > 100 * EXACT


def test_one_wrong_depth_is_seen_under_a_window() -> None:
    case = replace(sample_case(), window=12, rows=[])
    depths = case.rows[0].depths.copy()
    depths[9] += 1
    case.rows = [replace(case.rows[0], depths=depths)]
    assert broken_error(case) > 100 * EXACT


def test_one_wrong_block_table_entry_is_seen() -> None:
    case = sample_case()
    case.table[0, 1] = case.table[0, 0]
    assert broken_error(case) > 100 * EXACT


def test_a_wrong_scale_is_seen() -> None:
    case = sample_case()
    expected = case.expected()
    case.scale *= 1.01
    assert relative_error(attend(case), expected) > 100 * EXACT


def test_wrong_key_and_value_scales_are_seen() -> None:
    for scales in ((1.0, 0.505, 2.0), (1.0, 0.5, 2.02), (1.01, 0.5, 2.0)):
        case = sample_case()
        case.scales = (1.0, 0.5, 2.0)
        expected = case.expected()
        case.scales = scales
        assert relative_error(attend(case), expected) > 100 * EXACT


def test_a_wrong_base_is_seen() -> None:
    case = sample_case()
    expected = case.expected()
    case.rows = [replace(case.rows[0], base=36)]
    assert relative_error(attend(case), expected) > 100 * EXACT


@pytest.mark.parametrize("broken", ["lost", "unweighted"])
def test_a_wrong_combination_of_splits_is_seen(broken: str, monkeypatch: Any) -> None:
    from vllm_ext.attention import triton_tree

    real = triton_tree.combine_kernel

    class Combine:
        def __getitem__(self, grid: Any) -> Any:
            def launch(out: Any, partial: Any, lse: Any, trees: Any, *rest: Any, **kw: Any) -> None:
                if broken == "unweighted":
                    lse.zero_()
                else:
                    trees = trees.clone()
                    trees[:, 7] -= 1
                real[grid](out, partial, lse, trees, *rest, **kw)

            return launch

    case = Case([(60, random_tree(9, 5))], heads=2, kv_heads=1, seed=4, device=DEVICE)
    check(case, chunk=32)
    monkeypatch.setattr(triton_tree, "combine_kernel", Combine())
    assert broken_error(case, chunk=32) > 100 * EXACT


def test_reading_past_the_last_row_is_seen() -> None:
    """The poison works: a tree that claims one row more than was written reads NaN."""
    case = sample_case()
    words = np.concatenate([case.rows[0].words, [[np.int64(1) << np.int64(10), 0]]])
    words[:, 0] |= np.int64(1) << np.int64(10)
    depths = np.append(case.rows[0].depths, 1).astype(np.int32)
    case.query = torch.cat([case.query, case.query[:1]])
    case.rows = [replace(case.rows[0], words=words, depths=depths)]
    assert attend(case).isnan().any()


def test_a_context_cannot_have_scaled_values() -> None:
    case = Case([(9, random_tree(2, 0))], device=DEVICE)
    context = case.context()
    case.scales = (1.0, 2.0, 3.0)
    with pytest.raises(ValueError, match="scaled"):
        attend(case, context=context)


def test_bad_shapes_are_refused() -> None:
    case = sample_case()
    case.query = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="last stride of each must be 1"):
        attend(case)
