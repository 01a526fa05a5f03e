# SPDX-License-Identifier: Apache-2.0
"""The kernels compile for NVIDIA GPUs, down to machine code, on a machine that has none."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

HOPPER_SHARED = 227 * 1024
AMPERE_SHARED = 163 * 1024


def compiled(kernel: Any, constants: dict[str, Any], pointers: dict[str, str], arch: int) -> Any:
    """Compile as the launcher would: aligned pointers and strides, int32 numbers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants and name.isupper():
            signature[name] = "constexpr"
            continue
        default = "*i32" if name.endswith("_ptr") else "i32"
        signature[name] = pointers.get(name, default)
        if name.endswith("_ptr") or "stride" in name:
            aligned[(index,)] = [["tt.divisibility", 16]]
    options = {"num_warps": constants.pop("warps"), "num_stages": 2}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@pytest.mark.parametrize(
    ("arch", "shared", "head", "dtype", "stored", "special", "resumed"),
    [
        (90, HOPPER_SHARED, 128, "bf16", "fp8e4nv", True, False),
        (80, AMPERE_SHARED, 256, "fp16", "fp16", False, False),
        (90, HOPPER_SHARED, 128, "bf16", "bf16", False, True),
    ],
)
def test_the_tree_kernel(
    arch: int, shared: int, head: int, dtype: str, stored: str, special: bool, resumed: bool
) -> None:
    import triton.language as tl

    from vllm_ext.attention import triton_kernels, triton_tree

    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    tile = triton_tree.choose_tile(65, 4, head, torch_dtype)
    constants = {
        "GROUP": 4,
        "PAGE": 16,
        "HEAD": head,
        "HEAD_PADDED": head,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "WINDOWED": special,
        "CAPPED": special,
        "QUERY_SCALED": False,
        "KV_SCALED": special,
        "RESUMED": resumed,
        "FACTOR": {"bf16": tl.bfloat16, "fp16": tl.float16}[dtype],
        "warps": tile.warps,
    }
    pointers = {
        "out_ptr": f"*{dtype}",
        "query_ptr": f"*{dtype}",
        "key_ptr": f"*{stored}",
        "value_ptr": f"*{stored}",
        "partial_ptr": "*fp32",
        "lse_ptr": "*fp32",
        "context_ptr": f"*{dtype}",
        "context_lse_ptr": "*fp32",
        "words_ptr": "*i64",
        "query_scale_ptr": "*fp32",
        "key_scale_ptr": "*fp32",
        "value_scale_ptr": "*fp32",
        "scale": "fp32",
        "cap": "fp32",
    }
    made = compiled(triton_kernels.tree_kernel, constants, pointers, arch)
    assert made.metadata.shared <= shared
    assert made.asm["cubin"]
    assert spilled(made.asm["ptx"], arch) == 0


def spilled(ptx: str, arch: int) -> int:
    """Bytes of registers that NVIDIA's assembler spills to memory."""
    from triton.backends.nvidia import compiler

    if not hasattr(compiler, "get_ptxas"):
        pytest.skip("this version of Triton does not say where its assembler is")
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        done = subprocess.run(
            [
                compiler.get_ptxas(arch).path,
                "-v",
                f"--gpu-name={target[1]}",
                source.name,
                "-o",
                os.devnull,
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    stores = re.findall(r"(\d+) bytes spill stores", done.stdout + done.stderr)
    assert stores
    return sum(map(int, stores))


def test_the_combine_kernel() -> None:
    from vllm_ext.attention import triton_kernels

    pointers = {"out_ptr": "*bf16", "partial_ptr": "*fp32", "lse_ptr": "*fp32"}
    constants = {"HEAD": 80, "HEAD_PADDED": 128, "warps": 1}
    assert compiled(triton_kernels.combine_kernel, constants, pointers, 90).asm["cubin"]


@pytest.mark.parametrize("arch", [80, 90])
def test_the_move_kernel(arch: int) -> None:
    import triton.language as tl

    from vllm_ext.attention.triton_move_kernel import move_kernel

    names = ("pointers_ptr", "slots_ptr", "moves_ptr", "starts_ptr")
    constants = {"PAGE": 16, "HEAD": 80, "HEAD_PADDED": 128, "BITS": tl.int16, "warps": 1}
    made = compiled(move_kernel, constants, dict.fromkeys(names, "*i64"), arch)
    assert made.asm["cubin"]
    assert spilled(made.asm["ptx"], arch) == 0


def test_no_step_has_the_tree_kernel_compiled_anew() -> None:
    from vllm_ext.attention.triton_kernels import tree_kernel

    params = {param.name: param for param in tree_kernel.params}
    assert params["context_rows"].do_not_specialize
    assert not params["key_stride_slot"].do_not_specialize


def test_no_step_has_the_move_kernel_compiled_anew() -> None:
    """How many nodes move, and where in a copied tensor they begin, changes from step to step."""
    from vllm_ext.attention.triton_move_kernel import move_kernel

    params = {param.name: param for param in move_kernel.params}
    assert params["count"].do_not_specialize
    assert params["moves_ptr"].do_not_specialize_on_alignment
    assert params["starts_ptr"].do_not_specialize_on_alignment
    assert not params["stride_slot"].do_not_specialize  # the same in every step
