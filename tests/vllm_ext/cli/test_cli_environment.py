# SPDX-License-Identifier: Apache-2.0
import json
import platform

import pytest
import typer

from vllm_ext.cli import engines, environment


def test_the_description_is_plain_json_and_holds_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    text = json.dumps(environment.describe(), allow_nan=False)
    assert "secret" not in text
    facts = json.loads(text)
    assert facts["settings"]["VLLM_CPU_KVCACHE_SPACE"] == "3"
    for key in ("date", "command", "cores", "memory_gib", "load_average", "python", "versions"):
        assert facts[key], key
    assert facts["versions"]["vllm-ext"]


@pytest.mark.parametrize(
    ("flags", "machine", "gpus", "expected"),
    [
        ("sse avx2", "x86_64", [], "float32"),
        ("sse avx512_bf16", "x86_64", [], "bfloat16"),
        ("sse amx_bf16", "x86_64", [], "bfloat16"),
        ("sse avx2", "x86_64", ["GPU"], "bfloat16"),
        ("", "arm64", [], "bfloat16"),
    ],
)
def test_bfloat16_only_where_it_is_fast(
    monkeypatch: pytest.MonkeyPatch, flags: str, machine: str, gpus: list[str], expected: str
) -> None:
    monkeypatch.setattr(environment, "_cpuinfo", lambda field: flags)
    monkeypatch.setattr(environment, "_gpus", lambda: gpus)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert environment.fast_dtype() == expected


def test_the_instruction_sets_that_matter_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_cpuinfo", lambda field: "sse avx2 amx_bf16 avx512_vnni")
    assert environment.describe()["cpu_features"] == ["avx2", "amx_bf16"]


def test_seeded_requests_never_meet_a_chunked_prompt_on_a_cpu() -> None:
    common = {"model": "m", "dtype": "float32", "max_model_len": 8192, "eager": None}
    seeded = engines.llm_options(**common, cuda=False, seeded=True)  # type: ignore[arg-type]
    assert seeded["enable_chunked_prefill"] is False
    assert seeded["max_num_batched_tokens"] >= 8192
    plain = engines.llm_options(**common, cuda=False)  # type: ignore[arg-type]
    assert "enable_chunked_prefill" not in plain
    assert plain["enforce_eager"] is True


def test_engines_share_a_gpu() -> None:
    options = engines.llm_options(
        model="m", dtype="bfloat16", max_model_len=64, eager=None, cuda=True, num_engines=3
    )
    assert options["gpu_memory_utilization"] == pytest.approx(0.3)
    assert options["enforce_eager"] is False


def test_the_users_cache_size_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    assert engines.engine_env(cuda=False) == {"VLLM_CPU_KVCACHE_SPACE": "7"}
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    assert engines.engine_env(cuda=False) == {"VLLM_CPU_KVCACHE_SPACE": "1"}
    assert engines.engine_env(cuda=True) == {}


def test_missing_extras_are_named_before_anything_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    engines.require_bench_extra("json")
    with pytest.raises(typer.Exit) as caught:
        engines.require_bench_extra("json", "no_such_module")
    assert caught.value.exit_code == 1
    assert 'no_such_module missing: pip install "vllm-ext[bench]"' in capsys.readouterr().err
