# SPDX-License-Identifier: Apache-2.0
"""Servers as arms: a stand-in for the server itself, and once the real ``vllm serve``."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.vllm_ext.cli.processes import alive, ends
from vllm_ext.cli import app, server_process
from vllm_ext.cli.engine_types import EngineConfig, EngineDiedError, EngineError
from vllm_ext.cli.served_engine import ServedEngine
from vllm_ext.cli.server_process import ServerProcess, exit_on_sigterm, serve_command

SCRIPT = Path(__file__).with_name("stand_in_server.py")
CONFIG = EngineConfig({"model": "m"}, {"FLAG": "set"})


@pytest.fixture(autouse=True)
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "engine" in request.keywords:
        return
    monkeypatch.setattr(
        server_process,
        "serve_command",
        lambda llm, port, name: [sys.executable, str(SCRIPT), str(port), llm["model"]],
    )


def worker_of(log: Path) -> int:
    found = re.search(r"worker (\d+)", log.read_text())
    assert found is not None
    return int(found[1])


def test_keyword_arguments_become_options(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = {
        "model": "m",
        "max_model_len": 64,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "speculative_config": {"method": "dyspec"},
    }
    command = serve_command(llm, 8123, "served")
    assert Path(command[0]).name == "vllm"
    assert command[1:3] == ["serve", "m"]
    assert {
        "--served-model-name=served",
        "--port=8123",
        "--max-model-len=64",
        "--enforce-eager",
        "--no-enable-prefix-caching",
        '--speculative-config={"method": "dyspec"}',
    } <= set(command)


def test_a_server_is_ready_when_started_and_gone_when_closed() -> None:
    waited: list[str] = []
    with ServerProcess(CONFIG, on_wait=waited.append) as server:
        assert "drafting_seconds" in server.get("/metrics")
        assert "FLAG=set" in server.log.read_text()
        worker = worker_of(server.log)
        assert alive(worker)
        # A session of its own would take the clients' turn on busy cores, and a shared group
        # would send a Ctrl-C to the server as well.
        assert os.getsid(worker) == os.getsid(0)
        assert os.getpgid(worker) != os.getpgid(0)
    assert ends(worker)
    assert not server.log.exists()
    server.close()  # a second time is harmless


def test_two_servers_do_not_meet() -> None:
    with ServerProcess(CONFIG) as one, ServerProcess(CONFIG) as two:
        assert one.url != two.url


@pytest.mark.parametrize(
    ("model", "said"),
    [("missing", "ended with code 1"), ("slow", "not ready after 3 seconds")],
)
def test_a_server_that_does_not_start_says_why_and_leaves_its_log(model: str, said: str) -> None:
    with pytest.raises(EngineError, match=said) as caught:
        ServerProcess(EngineConfig({"model": model}), start_seconds=3)
    found = re.search(r"the end of its log, (\S+):\n", str(caught.value))
    assert found is not None
    log = Path(found[1])
    assert ends(worker_of(log))
    assert ("no such model" in str(caught.value)) == (model == "missing")
    log.unlink()


def test_a_command_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_process, "serve_command", lambda *_: ["/no/such/vllm"])
    with pytest.raises(EngineError, match="/no/such/vllm cannot be run"):
        ServerProcess(CONFIG)


def test_termination_unwinds() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, exit_on_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_streams_are_read_side_by_side_with_times_and_counts() -> None:
    pytest.importorskip("openai")
    with ServedEngine(CONFIG) as engine:
        result = engine.generate([[5, 6, 7, 8, 9], [7, 8]], [{"max_tokens": 4}] * 2)
        long, short = result.requests
        assert long.completions[0].token_ids == [5, 6, 7, 8, 9]
        assert long.completions[0].text == "model" * 3
        assert short.completions[0].finish_reason == "length"
        # 50 ms before each chunk: three for the long answer.
        assert long.first_token_s + long.decode_s >= 0.15
        assert long.first_token_s >= 0.05
        assert long.decode_s > 0
        assert short.decode_s == 0.0
        assert result.wall_s >= 0.15
        assert (result.draft_tokens, result.accepted_tokens) == (2, 2)
        assert result.request_steps == 4  # chunks of two tokens
        assert (result.drafting_s, result.engine_steps) == (0.5, 2)
        assert engine.generate([[5]], [{}]).draft_tokens == 1


def test_a_halted_server_can_be_started_anew() -> None:
    pytest.importorskip("openai")
    with ServedEngine(CONFIG) as engine:
        first = worker_of(engine._server.log)
        engine.pause()
        engine.restart()
        assert ends(first)
        assert worker_of(engine._server.log) != first
        assert engine.generate([[5]], [{}]).num_tokens == 1


def test_bench_restarts_between_rounds_or_not_at_all(prompts: Path, tmp_path: Path) -> None:
    result = bench("m", prompts, tmp_path / "out.json", "--restart")
    assert result.exit_code == 2
    assert "give --repeat" in result.output


def test_rows_are_encoded_by_the_server() -> None:
    pytest.importorskip("openai")
    with ServedEngine(CONFIG) as engine:
        assert engine.encode(["A"], raw=True) == [[65]]
        (chat,) = engine.encode(["A"], raw=False)
        assert json.loads("".join(map(chr, chat))) == [{"role": "user", "content": "A"}]


def test_a_refusal_leaves_the_server_usable_and_a_crash_does_not() -> None:
    pytest.importorskip("openai")
    with ServedEngine(CONFIG) as engine:
        with pytest.raises(EngineError, match=r"refused a request.*no such prompt") as refused:
            engine.generate([[5, 6, 7], [0]], [{}] * 2)
        assert not isinstance(refused.value, EngineDiedError)
        assert engine.generate([[5]], [{}]).num_tokens == 1
        with pytest.raises(EngineDiedError, match="does not answer") as died:
            engine.generate([[1]], [{}])
    found = re.search(r"its log, (\S+):", str(died.value))
    assert found is not None
    Path(found[1]).unlink()  # kept, for the reader


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "xyxyxyxyxyxyxyxyxyxy", "task": "copy"}, {"turns": ["Say hello."]}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def bench(model: str, prompts: Path, out: Path, *more: str) -> Any:
    arguments = ["bench", "--server", "--model", model, "--prompts", str(prompts)]
    return CliRunner().invoke(app, [*arguments, "--json", str(out), *more])


def test_bench_on_servers_from_end_to_end(prompts: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    out = tmp_path / "out.json"
    result = bench("m", prompts, out, "--batch", "1,2", "--max-tokens", "4")
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert written["settings"]["server"] is True
    assert [e["batch"] for e in written["arms"]["dyspec"]] == [1, 2]
    assert written["arms"]["dyspec"][0]["ttft_ms"]["median"] >= 50


def test_bench_names_the_arm_whose_server_does_not_start(prompts: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    result = bench("missing", prompts, tmp_path / "out.json")
    assert result.exit_code == 1
    assert "arm 'none' did not start: the server ended with code 1" in result.output
    assert "no such model" in result.output
    found = re.search(r"its log, (\S+):", result.output)
    assert found is not None
    Path(found[1]).unlink()


@pytest.mark.engine
def test_bench_on_real_servers(served_model: Path, prompts: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    arguments = ["--arms", "none,dyspec", "--max-tokens", "48", "--dtype", "float32"]
    # Whether drafts pay on this model, whose steps take next to nothing, is not asked here.
    arguments += ["--max-model-len", "256", "--arm-config", 'dyspec={"adaptive": false}']
    out = tmp_path / "out.json"
    result = bench(str(served_model), prompts, out, *arguments, "--batch", "1,2")
    assert result.exit_code == 0, result.output
    arms = json.loads(out.read_text())["arms"]
    for none, dyspec in zip(arms["none"], arms["dyspec"], strict=True):
        assert none["tokens_per_step"] == 1.0
        assert none["drafting_share"] is None
        assert dyspec["tokens"] == none["tokens"] > 0
        assert dyspec["accepted_tokens"] > 0
        assert 0 < dyspec["drafting_share"] < 1
        assert dyspec["identical_to_none"] == 1.0
        assert none["ttft_ms"]["median"] > 0
        assert none["inter_token_ms"]["median"] > 0
