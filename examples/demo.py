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
import sys
import time
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
from vllm_ext.cli.engine_types import EngineConfig, EngineError
from vllm_ext.cli.model import fetch
from vllm_ext.cli.progress import progress
from vllm_ext.cli.prompts import load_prompts
from vllm_ext.cli.server_process import ServerProcess, exit_on_sigterm

PROMPTS = Path(__file__).parent / "prompts.jsonl"
SPECULATION = {"method": "dyspec"}
MAX_MODEL_LEN = 2048
START_SECONDS = 300
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
    step("model")
    path = model or str(fetch())
    typer.echo(path)
    step(f"vllm serve, with --speculative-config '{json.dumps(SPECULATION)}'")
    with exit_on_sigterm(), server(path, port or (8000 if serve else None)) as url:
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


@contextlib.contextmanager
def server(model: str, port: int | None) -> Iterator[str]:
    """A running `vllm serve`; yields its address and stops it and all its processes at the end."""
    config = EngineConfig(
        {
            "model": model,
            "max_model_len": MAX_MODEL_LEN,
            "dtype": environment.fast_dtype(),
            "speculative_config": SPECULATION,
            "enforce_eager": not environment.has_cuda(),  # compiling takes minutes on a CPU
        },
        {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2")},
    )
    try:
        with progress("starting (seconds)", START_SECONDS) as advance:
            running = ServerProcess(
                config,
                name="demo",
                port=port,
                start_seconds=START_SECONDS,
                on_wait=lambda line: advance(1, line.split("] ")[-1][:40]),
            )
    except EngineError as error:
        sys.exit(f"error: {error}")
    with running:
        yield running.url


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
