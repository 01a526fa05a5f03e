# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the GPU benchmark, and its kernel part in a tiny configuration."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tests.vllm_ext.attention.flash_standin import flash_attn_varlen_func
from vllm_ext.attention import measure
from vllm_ext.attention.measure import (
    SHAPES,
    Bench,
    Result,
    Shape,
    Timing,
    call_bytes,
    copy_rate,
    grid,
    random_tree,
    table,
)
from vllm_ext.attention.measure_flash import Flash

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROOT = Path(__file__).parents[3]
TINY = Shape("tiny", heads=4, kv_heads=2, head_size=64)


def test_floor_by_hand() -> None:
    # Llama-8B, one request: 1024 context slots and 2 rows, K and V of 8 heads; 2 rows of 32 heads,
    # read and written; 128 elements of 2 bytes each.
    expected = (2 * 1026 * 8 + 2 * 2 * 32) * 128 * 2
    assert call_bytes(SHAPES[0], 1, 1024, 2, 2) == expected
    assert call_bytes(SHAPES[0], 3, 1024, 2, 2) == 3 * expected
    # The shard of a 70B model has an eighth of the key heads and a quarter of the query heads.
    assert call_bytes(SHAPES[1], 1, 1024, 2, 2) == (2 * 1026 + 2 * 2 * 8) * 256


def result(tree: float, stock: float | None) -> Result:
    return Result(
        "s",
        1,
        512,
        8,
        Timing(tree, tree - 1, tree + 1),
        Timing(50.0, 49.0, 51.0),
        Timing(stock, stock, stock) if stock else None,
        floor=30.0,
        added=10.0,
        host=5.0,
    )


def test_the_target_compares_with_the_stock_kernel_where_there_is_one() -> None:
    assert result(60.0, 40.0).ratio == pytest.approx(60 / (40 + 10))
    assert result(60.0, None).ratio == pytest.approx(60 / (50 + 10))
    assert result(60.0, 40.0).as_json()["ratio"] == pytest.approx(1.2)


def test_the_table_marks_what_misses_the_target() -> None:
    lines = table([result(60.0, 40.0), result(50.0, 40.0), result(60.0, None)]).splitlines()
    assert "1.20 *" in lines[2]
    assert "*" not in lines[3]
    assert "| - |" in lines[4]
    assert lines[-1].endswith("1 of 3")


def test_the_grid_is_complete() -> None:
    assert len(list(grid(SHAPES, (1, 8), (512, 2048, 8192), (1, 64)))) == 2 * 2 * 3 * 2


def test_random_trees_are_trees() -> None:
    tree = random_tree(0, 0, 10, 40, seed=1)
    bits = np.unpackbits(tree.words.view(np.uint8), axis=1, bitorder="little")[:, :41]
    assert (bits.sum(axis=1) == tree.depths + 1).all()  # itself, its ancestors and the root
    assert bits[:, 0].all()


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bench_checks_and_times_the_kernel(dtype: torch.dtype) -> None:
    bench = Bench(TINY, 2, 24, 5, dtype, DEVICE)
    assert bench.error() < (1e-5 if dtype == torch.float32 else 2e-2)
    measured = bench.measure(None, rate=copy_rate(DEVICE, 1 << 20))
    assert measured.tree.median > 0
    assert measured.stock is None
    assert measured.floor > measured.added > 0


@pytest.mark.interpreter
def test_the_bench_measures_the_other_route_where_there_is_one() -> None:
    flash = Flash(flash_attn_varlen_func, 2)
    bench = Bench(TINY, 2, 24, 5, torch.float32, DEVICE)
    assert bench.error(flash.contexts(bench)) < 1e-5
    measured = bench.measure(flash, rate=copy_rate(DEVICE, 1 << 20))
    assert measured.flash is not None
    assert measured.flash.median > 0
    assert measured.stock is not None
    assert measured.stock.median > 0
    if not torch.cuda.is_available():
        assert Flash.installed() is None
    wrong = Flash(lambda **given: flash_attn_varlen_func(**{**given, "softmax_scale": 1.0}), 2)
    assert bench.error(wrong.contexts(bench)) > 1e-2


def test_the_faster_route_is_compared() -> None:
    slow, fast = Timing(60.0, 59.0, 61.0), Timing(45.0, 44.0, 46.0)
    both = replace(result(60.0, 40.0), flash=fast, flash_host=9.0)
    assert both.ratio == pytest.approx(45 / (40 + 10))
    assert replace(both, tree=fast, flash=slow).ratio == both.ratio
    line = table([both]).splitlines()[2]
    assert "| 60.0 (59.0-61.0) | 45.0 (44.0-46.0) |" in line
    assert line.endswith("| 5, 9 |")


@pytest.mark.interpreter
def test_the_bench_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    real = measure.tree_attention

    def scaled(*given: Any, **more: Any) -> None:
        real(*given[:-1], given[-1] * 1.01, **more)

    monkeypatch.setattr(measure, "tree_attention", scaled)
    assert Bench(TINY, 1, 24, 5, torch.float32, DEVICE).error() > 1e-3


@pytest.mark.interpreter
def test_a_commit_moves_every_node(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = measure.move_paths
    monkeypatch.setattr(measure, "move_paths", lambda *given: made.append(given) or real(*given))
    measure.commit_call(TINY, 2, 3, 4, torch.float32, DEVICE)()
    ((caches, slots, moves, starts),) = made
    assert len(caches.pointers) == 2
    assert starts.tolist() == [0, 4, 8, 12]
    source, target = slots[moves[0]].tolist(), slots[moves[1]].tolist()
    assert len(set(target)) == len(set(source)) == 12
    assert all(s > t for s, t in zip(source, target, strict=True))


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_bench", ROOT / "examples" / "gpu_bench.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_steps_from_tokens(script: Any) -> None:
    # 2 requests emit 100 tokens each, 40 of all were drafted: 160 request-steps, 80 steps.
    assert script.step_milliseconds(4.0, 200, 40, 2) == pytest.approx(4000 / 80)
    assert script.numbers("1,8,64") == (1, 8, 64)


def test_steps_are_compared_with_those_without_draft(script: Any) -> None:
    rows = [
        {"nodes": n, "batch": b, "step_ms": ms, "accepted_per_step": 0.5}
        for n, b, ms in [(0, 1, 10.0), (0, 8, 20.0), (8, 1, 15.0), (8, 8, 22.0)]
    ]
    text = script.step_table(rows)
    assert "| 1 | 8 | 15.00 | 1.50 | 0.50 |" in text
    assert "| 8 | 8 | 22.00 | 1.10 | 0.50 |" in text
    assert "| 1 | 8 | 15.00 | - |" in script.step_table(rows[2:])


def test_without_a_gpu_the_kernel_part_says_what_to_do() -> None:
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("it runs here")
    command = [sys.executable, "examples/gpu_bench.py", "kernel"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "TRITON_INTERPRET=1" in done.stderr


def test_no_vllm_is_imported() -> None:
    code = (
        "import sys; sys.modules['vllm'] = None; sys.path.insert(0, 'examples');"
        "import gpu_bench; from vllm_ext.attention import measure"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
