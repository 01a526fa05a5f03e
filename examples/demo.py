# SPDX-License-Identifier: Apache-2.0
"""Serve a small model with dyspec, chat with it, and compare its speed with plain vLLM's.

python examples/demo.py            # the whole tour, then everything is stopped again
python examples/demo.py --serve    # leave the server up until Ctrl-C
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from vllm_ext.cli import environment
from vllm_ext.cli.arms import parse_arms
from vllm_ext.cli.bench import Settings, measure
from vllm_ext.cli.bench_report import overview_table
from vllm_ext.cli.bench_run import Plan
from vllm_ext.cli.model import fetch
from vllm_ext.cli.progress import progress
from vllm_ext.cli.prompts import load_prompts

PROMPTS = Path(__file__).parent / "prompts.jsonl"
SPECULATION = {"method": "dyspec"}
MAX_MODEL_LEN = 2048
START_SECONDS = 300
STOP_SECONDS = 30
QUESTION = "Write a short Python function that counts the vowels of a word, and explain it."


def main(
    serve: Annotated[
        bool, typer.Option("--serve", help="Leave the server up until Ctrl-C.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Model to serve.  [default: SmolLM2-135M-Instruct, fetched once]"),
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port.  [default: 8000 with --serve, else a free one]")
    ] = None,
) -> None:
    """Serve a small model with dyspec, chat with it, and compare its speed with plain vLLM's."""
    # A terminated demo stops its server too: SystemExit unwinds the context manager below.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    step("model")
    path = model or str(fetch())
    typer.echo(path)
    chosen = port or (8000 if serve else free_port())
    step(f"vllm serve, with --speculative-config '{json.dumps(SPECULATION)}'")
    with server(path, chosen) as url:
        if serve:
            wait_for_interrupt(url)
        step("chat")
        chat(url)
        show_metrics(url)
    step("speed: plain vLLM, vLLM's ngram, dyspec, in turns on the same prompts")
    compare_speed(path)


def step(text: str) -> None:
    """Announce a part of the demo."""
    typer.secho(f"\n==> {text}", bold=True)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def server(model: str, port: int) -> Iterator[str]:
    """A running `vllm serve`; yields its address and stops it and all its processes at the end."""
    command = [
        str(Path(sys.executable).parent / "vllm"),
        "serve",
        model,
        "--served-model-name=demo",
        f"--port={port}",
        f"--max-model-len={MAX_MODEL_LEN}",
        f"--dtype={environment.fast_dtype()}",
        f"--speculative-config={json.dumps(SPECULATION)}",
    ]
    if not environment.has_cuda():
        command.append("--enforce-eager")  # compiling takes minutes on a CPU
    env = {"VLLM_CPU_KVCACHE_SPACE": "2", **os.environ}
    with tempfile.NamedTemporaryFile("w+", prefix="vllm-serve-", suffix=".log") as log:
        # A session of its own, so that its workers can be stopped with it, and Ctrl-C reaches
        # only this program.
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_healthy(process, url, Path(log.name))
            yield url
        finally:
            stop(process)


def wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait with a progress bar; end the program with the server's last words if it fails."""
    with progress("starting (seconds)", START_SECONDS) as advance:
        for _ in range(START_SECONDS):
            if process.poll() is not None:
                fail("the server ended", log)
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                return
            time.sleep(1)
            advance(1, last_line(log))
    fail(f"the server was not ready after {START_SECONDS} seconds", log)


def last_line(log: Path) -> str:
    """The end of the log, short enough for the progress bar."""
    lines = log.read_text(errors="replace").split("\n")
    return next((line.split("] ")[-1][:40] for line in reversed(lines) if line.strip()), "")


def fail(reason: str, log: Path) -> NoReturn:
    """End the program with the last lines of the server's log."""
    typer.echo("\n".join(log.read_text(errors="replace").splitlines()[-40:]), err=True)
    sys.exit(f"error: {reason}; its last lines are above")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server's whole process group, gently first."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for_interrupt(url: str) -> NoReturn:
    """Say how to use the server, then wait."""
    body = '{"model": "demo", "messages": [{"role": "user", "content": "Hello!"}]}'
    typer.echo(
        f"{url}/v1 is up. Try:\n\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'\n"
        f"  python examples/online.py --url {url}/v1 --model demo 'Hello!'\n\n"
        "Ctrl-C stops it."
    )
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()
    typer.echo("stopping")
    sys.exit(0)


def chat(url: str) -> None:
    """One request as a whole and one streamed, through the openai client."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    first = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Which planet is the largest? One sentence."}],
        max_tokens=48,
        temperature=0.0,
    )
    typer.echo(
        f"> Which planet is the largest? One sentence.\n{first.choices[0].message.content}\n"
    )
    typer.echo(f"> {QUESTION} (streamed)")
    start = time.perf_counter()
    stream = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=96,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
    )
    tokens = 0
    for chunk in stream:
        if chunk.choices:
            typer.echo(chunk.choices[0].delta.content or "", nl=False)
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
    seconds = time.perf_counter() - start
    typer.echo(f"\n({tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} tokens/s)")


def show_metrics(url: str) -> None:
    """The server's own count of what was drafted and accepted."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    wanted = (
        "vllm:spec_decode_num_draft_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_total",
    )
    for line in lines:
        if line.startswith(wanted):
            name, _, value = line.replace("{", " {", 1).partition(" ")
            typer.echo(f"{name} {float(value.split()[-1]):.0f}")


def compare_speed(model: str) -> None:
    """The table of `vllm-ext bench` on a few prompts."""
    from rich.console import Console

    settings = Settings(
        model=model,
        arms=parse_arms("none,ngram,dyspec"),
        plan=Plan(batches=[1], rounds=1, max_tokens=48, temperature=0.0),
        dtype=environment.fast_dtype(),
        max_model_len=MAX_MODEL_LEN,
    )
    result: dict[str, Any] = measure(settings, load_prompts(PROMPTS))
    Console().print(overview_table(result["arms"]))
    typer.echo(
        "same: answers identical to plain vLLM's. For a proof: make verify; to measure: make bench."
    )


if __name__ == "__main__":
    typer.run(main)
