# SPDX-License-Identifier: Apache-2.0
"""The process around an engine, with a stand-in for the engine itself, and once with a real one."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.vllm_ext.cli.processes import alive, becomes, ends
from vllm_ext.cli import app
from vllm_ext.cli.engine_process import EngineProcess
from vllm_ext.cli.engine_types import EngineConfig, EngineDiedError, EngineError

STAND_IN = """
import os, subprocess, sys, types
from prometheus_client import Counter

COUNTERS = [Counter(name, "of a step", ["engine"]) for name in
            ("vllm:spec_decode_num_draft_tokens", "vllm_ext:drafting_seconds", "vllm_ext:steps")]

class LLM:
    def __init__(self, **kwargs):
        print("starting", flush=True)
        if kwargs["model"] == "missing":
            raise ValueError("no such model")
        self.helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        self.llm_engine = types.SimpleNamespace(engine_core=self)
        self.kwargs = kwargs

    def get_tokenizer(self):
        return self

    def encode(self, text, add_special_tokens=True):
        return [int(add_special_tokens), *map(ord, text)]

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "".join(m["role"][0] + m["content"] for m in messages) + ">"

    def generate(self, inputs, sampling, use_tqdm):
        if inputs[0]["prompt_token_ids"] == [0]:
            os._exit(3)
        if inputs[0]["prompt_token_ids"] == [1]:
            raise ValueError("refused")
        for counter, amount in zip(COUNTERS, (3, 0.25, 2)):
            counter.labels("0").inc(amount)
        mine = types.SimpleNamespace(token_ids=[self.helper.pid, os.getpid()], finish_reason="stop",
                                     stop_reason=None, text=os.environ["FLAG"], logprobs=None)
        return [types.SimpleNamespace(outputs=[mine], metrics=None, prompt_logprobs=None)]

    def shutdown(self, timeout):
        pass  # leaves its helper running, as a crashed engine would

class SamplingParams:
    def __init__(self, **kwargs):
        pass
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    """A configuration whose process imports a small module in place of vLLM."""
    package = tmp_path / "vllm"
    (package / "v1" / "engine").mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN, encoding="utf-8")
    (package / "sampling_params.py").write_text("StructuredOutputsParams = dict\n")
    for folder in ("v1", "v1/engine"):
        (package / folder / "__init__.py").touch()
    (package / "v1/engine/exceptions.py").write_text("class EngineDeadError(Exception): ...\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # the child gets this path
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return EngineConfig({"model": "m"}, {"FLAG": "set"})


def test_environment_and_calls_reach_the_engine(stand_in: EngineConfig) -> None:
    with EngineProcess(stand_in) as engine:
        (request,) = engine.generate([[7]], [{}]).requests
        assert request.completions[0].text == "set"
        assert request.completions[0].token_ids[1] != os.getpid()
        # Raw texts keep the tokenizer's special tokens; templates bring their own.
        assert engine.encode(["A"], raw=True) == [[1, 65]]
        assert engine.encode(["A"], raw=False) == [[0, *map(ord, "uA>")]]
        messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "A"}]
        assert engine.encode([messages], raw=True) == [[0, *map(ord, "sSuA>")]]


def test_each_call_counts_its_own_drafts_and_drafting_time(stand_in: EngineConfig) -> None:
    with EngineProcess(stand_in) as engine:
        for _ in range(2):
            result = engine.generate([[7]], [{}])
            assert (result.draft_tokens, result.accepted_tokens) == (3, 0)
            assert (result.drafting_s, result.engine_steps) == (0.25, 2)


def test_closing_ends_every_process_of_the_engine(stand_in: EngineConfig) -> None:
    engine = EngineProcess(stand_in)
    helper, host = engine.generate([[7]], [{}]).requests[0].completions[0].token_ids
    assert alive(helper)
    assert alive(host)
    engine.close()
    engine.close()
    assert ends(helper)
    assert ends(host)
    assert not engine.log.exists()


def test_a_paused_engine_and_its_helpers_do_not_run(stand_in: EngineConfig) -> None:
    with EngineProcess(stand_in) as engine:
        helper, host = engine.generate([[7]], [{}]).requests[0].completions[0].token_ids
        engine.pause()
        assert becomes(helper, "T")
        assert becomes(host, "T")
        engine.resume()
        assert engine.generate([[7]], [{}]).num_tokens == 2
        engine.pause()  # and is closed all the same
    assert ends(helper)
    assert ends(host)
    assert not engine.log.exists()


def test_several_start_side_by_side(stand_in: EngineConfig) -> None:
    good = EngineProcess(stand_in, wait=False)
    bad = EngineProcess(EngineConfig({"model": "missing"}, stand_in.env), wait=False)
    with pytest.raises(EngineError, match="no such model"):
        bad.wait()
    good.wait()
    assert good.generate([[7]], [{}]).num_tokens == 2
    never_waited_for = EngineProcess(stand_in, wait=False)
    for engine in (good, bad, never_waited_for):
        engine.close()
    assert not never_waited_for.log.exists()


def test_a_refused_request_leaves_the_engine_usable(stand_in: EngineConfig) -> None:
    with EngineProcess(stand_in) as engine:
        with pytest.raises(EngineError, match="ValueError: refused") as caught:
            engine.generate([[1]], [{}])
        assert not isinstance(caught.value, EngineDiedError)
        assert engine.generate([[7]], [{}]).num_tokens == 2


def test_a_crash_is_told_apart_and_the_engine_can_be_restarted(stand_in: EngineConfig) -> None:
    with EngineProcess(stand_in) as engine:
        log = engine.log
        with pytest.raises(EngineDiedError, match=log.name):
            engine.generate([[0]], [{}])
        with pytest.raises(EngineDiedError):
            engine.generate([[7]], [{}])
        engine.restart()
        assert engine.generate([[7]], [{}]).num_tokens == 2
    assert log.read_text() == "starting\n"


def test_an_engine_that_does_not_start_says_why(stand_in: EngineConfig) -> None:
    with pytest.raises(EngineError, match=r"no such model; the engine's log: .*\.log"):
        EngineProcess(EngineConfig({"model": "missing"}, stand_in.env))


@pytest.mark.engine
def test_bench_on_a_real_engine(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from vllm_ext.cli.model import fetch

    prompts = tmp_path / "prompts.jsonl"
    copy = "Repeat this twice: one two three four five six seven eight nine ten."
    rows = [{"prompt": copy, "task": "copy"}, {"turns": ["Say hello."], "category": "chat"}]
    prompts.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    out = tmp_path / "out.json"
    arguments = ["bench", "--model", str(fetch()), "--prompts", str(prompts), "--json", str(out)]
    arguments += ["--arms", "none,ngram,dyspec", "--max-tokens", "24", "--dtype", "float32"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    arms: dict[str, list[dict[str, Any]]] = json.loads(out.read_text())["arms"]
    none, ngram = arms["none"][0], arms["ngram"][0]
    assert none["draft_tokens"] == 0
    assert none["tokens_per_step"] == 1.0
    assert ngram["accepted_tokens"] > 0
    assert ngram["tokens_per_step"] > 1.0
    assert ngram["tokens"] == none["tokens"]
    assert ngram["identical_to_none"] == 1.0
    assert none["ttft_ms"]["median"] > 0
    assert none["drafting_share"] is ngram["drafting_share"] is None
    assert 0 < arms["dyspec"][0]["drafting_share"] < 1
    assert arms["dyspec"][0]["drafting_ms_per_step"] > 0
    assert set(ngram["tasks"]) == {"copy", "chat"}
