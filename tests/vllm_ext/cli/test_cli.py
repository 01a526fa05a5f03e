# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_ext.cli import app, bench, engines, environment, verify
from vllm_ext.cli.arms import parse_arms
from vllm_ext.cli.bench_run import Plan
from vllm_ext.cli.engine_types import EngineConfig, EngineError


def test_the_command_line_imports_neither_vllm_nor_torch() -> None:
    code = "import sys, vllm_ext.cli; sys.exit(bool({'vllm', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_terminated_command_stops_what_it_started(tmp_path: Path) -> None:
    code = f"""
import os, signal, pathlib, vllm_ext.cli as cli
def app():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    finally:
        pathlib.Path({str(tmp_path / "stopped")!r}).touch()
cli.app = app
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 128 + 15
    assert (tmp_path / "stopped").exists()


@pytest.mark.parametrize("command", ["bench", "verify", "doctor", "methods", "model", "head"])
def test_every_command_has_help(command: str) -> None:
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "--arms", "ngram"], "'none' is missing"),
        (["bench", "--batch", "0"], "different positive numbers"),
        (["bench", "--batch", "1,x"], "different positive numbers"),
        (["bench", "--arm-config", "ngram"], "NAME=JSON"),
        (["bench", "--repeat", "0"], "repeat"),
        (["bench", "--limit", "1", "--sample", "1"], "not both"),
        (["bench", "--fresh", "--batch", "1,4"], "fewer than 4"),
        (["verify", "--sampling", "nucleus"], "all"),
        (["verify", "--method", "none"], "different names"),
        (["verify", "--prompts", "/no/such/file"], "does not exist"),
    ],
)
def test_wrong_usage_exits_with_2_before_any_engine_starts(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a"}', encoding="utf-8")
    command, *rest = arguments
    common = ["--model", "m", "--prompts", str(prompts), "--json", str(tmp_path / "out.json")]
    result = CliRunner().invoke(app, [command, *common, *rest], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert said in result.output
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("command", ["bench", "verify"])
def test_vllms_suffix_without_its_package_names_the_way_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, fake_engines: list[Any]
) -> None:
    found = engines.importlib.util.find_spec

    def hidden(name: str) -> Any:
        return None if name == "arctic_inference" else found(name)

    monkeypatch.setattr(engines.importlib.util, "find_spec", hidden)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a"}', encoding="utf-8")
    arguments = ["--model", "m", "--prompts", str(prompts), "--json", str(tmp_path / "out.json")]
    arms = {"bench": ["--arms", "none,suffix"], "verify": ["--beside", "suffix"]}[command]
    result = CliRunner().invoke(app, [command, *arguments, *arms], env={"COLUMNS": "300"})
    assert result.exit_code == 1
    assert "make peers" in result.output
    assert not fake_engines
    # The method of this package needs nothing.
    ours = ["--arms", "none,suffix_tree"] if command == "bench" else ["--beside", "suffix_tree"]
    assert CliRunner().invoke(app, [command, *arguments, *ours]).exit_code == 0


@pytest.mark.parametrize(("command", "module"), [("bench", bench), ("verify", verify)])
def test_an_engine_that_does_not_start_exits_with_1_and_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, module: object
) -> None:
    pytest.importorskip("vllm")

    def fails(config: object, **options: bool) -> None:
        raise EngineError("the model is not there")

    monkeypatch.setattr(module, "EngineProcess", fails)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a"}', encoding="utf-8")
    arguments = ["--model", "m", "--prompts", str(prompts), "--json", str(tmp_path / "out.json")]
    result = CliRunner().invoke(app, [command, *arguments])
    assert result.exit_code == 1
    assert "the model is not there" in result.output


@pytest.fixture
def fake_engines(FakeEngine: Any, request_of: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Engines that answer with their prompt, and twice as fast when they speculate."""
    pytest.importorskip("vllm")
    started: list[Any] = []

    def start(config: EngineConfig, *, wait: bool = True) -> Any:
        speculates = "speculative_config" in config.llm
        engine = FakeEngine(
            lambda ids, params: request_of([*ids, 7, 7, 7]),
            seconds_per_token=0.01 if speculates else 0.02,
            drafted=4 if speculates else 0,
            accepted=2 if speculates else 0,
            drafting_share=0.05 if speculates else None,
        )
        started.append(engine)
        return engine

    for module in (bench, verify):
        monkeypatch.setattr(module, "EngineProcess", start)
        monkeypatch.setattr(module, "cached_files", lambda model: {"head": f"of {model}"})
    monkeypatch.setattr(start, "close", FakeEngine.close, raising=False)
    return started


def run(command: str, tmp_path: Path, *arguments: str) -> tuple[int, str, dict[str, Any]]:
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out.json"
    rows = [{"prompt": "a", "task": "x"}, {"prompt": "b", "task": "y"}, {"prompt": "c"}]
    prompts.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    common = ["--model", "m", "--prompts", str(prompts), "--json", str(out), "--max-tokens", "4"]
    result = CliRunner().invoke(app, [command, *common, *arguments])
    return result.exit_code, result.output, json.loads(out.read_text())


def test_bench_from_end_to_end(tmp_path: Path, fake_engines: list[Any]) -> None:
    code, output, result = run("bench", tmp_path, "--batch", "1,3", "--repeat", "2")
    assert code == 0
    assert list(result["arms"]) == ["none", "ngram", "dyspec"]
    assert [e["batch"] for e in result["arms"]["dyspec"]] == [1, 3]
    assert result["arms"]["dyspec"][0]["ratio"]["median"] == pytest.approx(2.0)
    assert set(result["arms"]["dyspec"][0]["tasks"]) == {"x", "y", "p"}
    assert result["arms"]["dyspec"][0]["drafting_share"] == pytest.approx(0.05)
    assert result["arms"]["none"][0]["drafting_share"] is None
    assert result["settings"]["llm"]["enable_prefix_caching"] is False
    assert result["settings"]["speculative_config"]["dyspec"] == {"method": "dyspec"}
    assert result["settings"]["model_files"] == {"head": "of m"}
    assert result["environment"]["command"]
    assert "2.00 [2.00 2.00]" in output
    assert len(fake_engines) == 3
    assert all(engine.closed for engine in fake_engines)


def test_only_engines_that_measure_nothing_start_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("vllm")
    arms = parse_arms("dyspec,none,copy,ngram,suffix")
    plan = Plan([1], rounds=1, max_tokens=8, temperature=0.0)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(environment, "has_cuda", lambda: False)

    def order(*, server: bool = False) -> list[list[str]]:
        settings = bench.Settings(model="m", arms=arms, plan=plan, server=server)
        return [[arm.name for arm in group] for group in bench.start_order(settings)]

    assert order() == [["none", "ngram"], ["suffix"], ["dyspec"], ["copy"]]
    alone = [[arm.name] for arm in arms]
    assert order(server=True) == alone
    monkeypatch.setattr(environment, "has_cuda", lambda: True)
    assert order() == alone


def test_engines_of_a_group_are_stopped_when_one_does_not_start(
    monkeypatch: pytest.MonkeyPatch, FakeEngine: Any
) -> None:
    pytest.importorskip("vllm")
    started = [FakeEngine(), FakeEngine()]

    def fails() -> None:
        raise EngineError("the model is not there")

    started[0].wait = fails
    waiting = iter(started)
    monkeypatch.setattr(bench, "EngineProcess", lambda config, wait: next(waiting))
    monkeypatch.setattr(bench, "start_order", lambda settings: [list(settings.arms)])
    plan = Plan([1], rounds=1, max_tokens=8, temperature=0.0)
    settings = bench.Settings(model="m", arms=parse_arms("none,ngram"), plan=plan)
    with (
        pytest.raises(EngineError, match="arm 'none' did not start: the model is not there"),
        bench.start_engines(settings),
    ):
        pytest.fail("engines that did not start were handed out")
    assert [engine.closed for engine in started] == [True, True]


def test_bench_on_several_files(tmp_path: Path, fake_engines: list[Any]) -> None:
    files = [tmp_path / name / "dev.jsonl" for name in ("named", "unnamed")]
    for file, row in zip(files, ({"prompt": "a", "task": "x"}, {"prompt": "a"}), strict=True):
        file.parent.mkdir()
        file.write_text("\n".join([json.dumps(row)] * 4), encoding="utf-8")
    out = tmp_path / "out.json"
    arguments = ["bench", "--model", "m", "--json", str(out), "--sample", "2"]
    arguments += [text for file in files for text in ("--prompts", str(file))]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert written["settings"]["datasets"] == {"named": 2, "unnamed": 2}
    entry = written["arms"]["dyspec"][0]
    assert {name: e["groups"] for name, e in entry["datasets"].items()} == {
        "named": 2,
        "unnamed": 2,
    }
    assert set(entry["tasks"]) == {"named/x", "unnamed"}
    assert [line.split()[0] for line in result.output.splitlines() if "named" in line] == [
        "named",
        "named/x",
        "unnamed",
    ]


def test_bench_says_when_no_prompt_fits(tmp_path: Path, fake_engines: list[Any]) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a"}', encoding="utf-8")
    arguments = ["--model", "m", "--prompts", str(prompts), "--json", str(tmp_path / "o.json")]
    arguments += ["--max-model-len", "8", "--max-tokens", "8"]
    result = CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "no prompt has at most 0 tokens" in result.output
    assert all(engine.closed for engine in fake_engines)


def test_verify_passes_on_equal_answers(tmp_path: Path, fake_engines: list[Any]) -> None:
    code, output, result = run("verify", tmp_path, "--beside", "ngram", "--batch", "1")
    assert code == 0
    assert result["passed"] is True
    assert set(result["compared"]) == {"dyspec", "ngram"}
    assert result["compared"]["dyspec"][0]["draft_tokens"] == 12
    assert result["settings"]["engine_environment"]["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert result["settings"]["model_files"] == {"head": "of m"}
    assert "PASS identical" in output


def test_verify_fails_on_one_different_token(
    tmp_path: Path, fake_engines: list[Any], request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = verify.EngineProcess

    def one_token_off(config: EngineConfig) -> Any:
        engine = honest(config)
        wrong = "speculative_config" in config.llm
        engine.answer = lambda ids, params: request_of(
            [*ids, 7, 8 if wrong and ids == [1] else 7, 7],
            logprobs=[{7: -0.5, 8: -0.75}] if "logprobs" in params else None,
        )
        return engine

    monkeypatch.setattr(verify, "EngineProcess", one_token_off)
    code, output, result = run("verify", tmp_path, "--batch", "1", "--sampling", "greedy")
    assert code == 1
    (found,) = result["mismatches"]["dyspec"]
    assert (found["prompt"], found["position"], found["token"]) == (1, 2, 8)
    assert found["gap"] == pytest.approx(0.25)
    assert "1 of 3 answers differ" in output
