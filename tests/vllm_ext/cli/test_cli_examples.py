# SPDX-License-Identifier: Apache-2.0
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vllm_ext.cli.prompts import load_prompts

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.mark.parametrize("name", ["offline.py", "online.py", "demo.py"])
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


def test_stopping_the_server_ends_its_workers_too(demo: Any, tmp_path: Path) -> None:
    # A server that dies at once, and a worker that ignores the polite signal.
    worker = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    script = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {worker!r}])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True
    )
    assert server.stdout is not None
    pid = int(server.stdout.readline())
    os.kill(pid, 0)
    demo.stop(server)
    server.stdout.close()
    assert server.poll() is not None
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("the worker outlived its server")
    demo.stop(server)  # a second time is harmless


def test_a_server_that_ends_is_reported_with_its_last_words(
    demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    log.write_text("ValueError: no such model\n")
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    with pytest.raises(SystemExit, match="the server ended"):
        demo.wait_until_healthy(process, "http://127.0.0.1:9", log)
    assert "no such model" in capsys.readouterr().err
