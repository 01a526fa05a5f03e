# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_ext.cli.engine_types import EngineConfig, EngineError
from vllm_ext.cli.prompts import load_prompts

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.mark.parametrize("name", ["offline.py", "online.py", "demo.py", "drafting_time.py"])
def test_each_example_runs_alone(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / name), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@pytest.fixture
def demo() -> Any:
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_prompts_are_of_several_tasks(demo: Any) -> None:
    prompts = load_prompts(demo.PROMPTS)
    assert len({p.task for p in prompts}) == len(prompts) >= 5


def test_a_server_that_does_not_start_ends_the_demo_with_its_reason(
    demo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(config: EngineConfig, **options: Any) -> None:
        assert config.llm["speculative_config"] == demo.SPECULATION
        raise EngineError("no such model")

    monkeypatch.setattr(demo, "ServerProcess", fails)
    with pytest.raises(SystemExit, match="no such model"):
        demo.server("m", None).__enter__()


def test_drafting_time_measures_what_it_says(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, str(EXAMPLES / "drafting_time.py"), "--json", str(out)]
    command += ["--steps", "20", "--batch", "1,3", "--context", "100", "--vocab-size", "2000"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    assert [(r["trees"], r["batch"]) for r in results] == [
        ("sized", 1),
        ("sized", 3),
        ("full", 1),
        ("full", 3),
    ]
    for result in results:
        assert 0 < result["total_ms"]["p10"] <= result["total_ms"]["median"]
        assert result["learn_ms"]["median"] < result["total_ms"]["median"]
        assert result["request_kib"] > 0
        assert result["global_mib"] > 1  # the trigram table alone has 2^18 entries
    assert all(r["nodes"] > 1 and r["tokens"] > 1 for r in results if r["trees"] == "full")
    assert done.stdout.count("\n| full") == 2
