# SPDX-License-Identifier: Apache-2.0
"""The real ``vllm serve`` with our method: requests, metrics, faults."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.vllm_ext.engine import make_tiny_model

pytestmark = pytest.mark.engine

MAX_LEN = 2304
START_SECONDS = 240
MODEL = "tiny"


def serve_command(model: Path, speculative: dict[str, Any], *more: str) -> list[str]:
    vllm = Path(sys.executable).with_name("vllm")
    return [
        str(vllm),
        "serve",
        str(model),
        "--served-model-name",
        MODEL,
        "--speculative-config",
        json.dumps(speculative),
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        str(MAX_LEN),
        "--max-num-batched-tokens",
        "256",
        "--max-num-seqs",
        "16",
        # Few blocks, all in use soon: pages of the KV cache count only once they are touched.
        "--num-gpu-blocks-override",
        "64",
        *more,
    ]


@dataclass
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return str(answer.read().decode())

    def complete(self, **body: Any) -> dict[str, Any]:
        data = json.dumps({"model": MODEL, "max_tokens": 24, "temperature": 0, **body}).encode()
        request = urllib.request.Request(
            self.url + "/v1/completions", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return dict(json.load(answer))

    def metric(self, name: str) -> float:
        lines = self.get("/metrics").splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name)]
        assert values, f"{name} is not among the server's metrics"
        return sum(values)

    def memory(self) -> int:
        tree = [psutil.Process(self.process.pid)]
        tree += tree[0].children(recursive=True)
        return sum(p.memory_full_info().uss for p in tree)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("served"), MAX_LEN)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "server.log"
    speculative = {"method": "dyspec", "num_speculative_tokens": 8}
    with log.open("wb") as output:
        process = subprocess.Popen(
            serve_command(model, speculative, "--host", "127.0.0.1", "--port", str(port)),
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
            start_new_session=True,
        )
    try:
        started = Server(f"http://127.0.0.1:{port}", process)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                started.get("/health")
                break
            except (urllib.error.URLError, ConnectionError):
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")
                time.sleep(0.5)
        assert "vllm-ext: method dyspec" in log.read_text()
        yield started
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def test_chat_and_stream_through_the_openai_client(server: Server) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=server.url + "/v1", api_key="none")
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "abcabcabc"}],
        "max_tokens": 40,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked).choices[0].message.content
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**asked, stream=True)
        if chunk.choices
    ]
    assert "".join(pieces) == whole
    assert whole


def test_metrics_show_vllms_counters_and_ours(server: Server) -> None:
    server.complete(prompt="xyxyxyxyxyxyxyxyxyxyxyxy", max_tokens=100, ignore_eos=True)
    assert server.metric("vllm:spec_decode_num_draft_tokens_total") > 0
    steps = server.metric("vllm_ext:steps_total")
    drafted = server.metric("vllm_ext:drafted_nodes_total")
    accepted = server.metric("vllm_ext:accepted_tokens_total")
    assert steps > 0
    assert drafted == server.metric("vllm:spec_decode_num_draft_tokens_total")
    assert accepted == server.metric("vllm:spec_decode_num_accepted_tokens_total")
    assert (
        server.metric("vllm_ext:emitted_tokens_total")
        == server.metric("vllm_ext:request_steps_total") + accepted
    )
    assert 0 < server.metric("vllm_ext:drafting_seconds_total") < 60
    assert server.metric("vllm_ext:tree_size_count") == server.metric(
        "vllm_ext:request_steps_total"
    )
    server.complete(prompt="xyxy", max_tokens=10, ignore_eos=True)
    assert server.metric("vllm_ext:steps_total") > steps


def test_a_request_switches_its_drafts_off_or_limits_them(server: Server) -> None:
    body = {"prompt": "pqpqpqpqpqpqpqpqpqpqpqpq", "max_tokens": 60, "ignore_eos": True}

    def drafted(xargs: dict[str, Any]) -> tuple[str, float]:
        before = server.metric("vllm_ext:drafted_nodes_total")
        text = server.complete(**body, vllm_xargs=xargs)["choices"][0]["text"]
        return text, server.metric("vllm_ext:drafted_nodes_total") - before

    plain, nodes = drafted({"speculation": "false"})
    assert nodes == 0
    assert drafted({"max_nodes": 0}) == (plain, 0)
    assert drafted({"speculation": False}) == (plain, 0)
    assert drafted({"max_nodes": "3"})[0] == plain
    assert server.metric("vllm_ext:capped_requests_total") > 100


@pytest.mark.parametrize(
    ("xargs", "message"),
    [
        ({"speculation": "perhaps"}, "speculation='perhaps'; give true or false"),
        ({"max_nodes": -3}, "max_nodes=-3; give a whole number from 0"),
        ({"max_nodes": [3]}, "max_nodes=[3]"),
    ],
)
def test_nonsense_about_drafts_is_the_clients_error(
    server: Server, xargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        server.complete(prompt="abc", vllm_xargs=xargs)
    assert error.value.code == 400
    assert message in error.value.read().decode()
    assert server.complete(prompt="abc")["choices"]


def test_shortest_and_longest_prompts(server: Server) -> None:
    short = server.complete(prompt=[5], max_tokens=3, ignore_eos=True)
    assert short["usage"] == {
        **short["usage"],
        "prompt_tokens": 1,
        "completion_tokens": 3,
    }
    tokens = [2 + (i * 7) % 250 for i in range(2000)]
    long = server.complete(prompt=tokens, max_tokens=20, ignore_eos=True, seed=1, temperature=1)
    assert long["usage"]["completion_tokens"] == 20


@pytest.mark.parametrize(
    "body",
    [
        {"min_p": 7.0},
        {"temperature": -1.0},
        {"prompt": "a" * (MAX_LEN + 10)},
        {"logit_bias": {"99999999": 1.0}},
        {"max_tokens": -3},
    ],
    ids=lambda body: next(iter(body)),
)
def test_bad_requests_get_400_and_the_server_goes_on(server: Server, body: dict[str, Any]) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        server.complete(**{"prompt": "abc", **body})
    assert error.value.code == 400
    assert server.complete(prompt="abc")["choices"]


def test_parameters_that_vllm_refuses_under_speculation(server: Server) -> None:
    answer = server.complete(
        prompt="abc", min_p=0.2, temperature=1.0, seed=1, logit_bias={"10": 100}, max_tokens=4
    )
    assert answer["usage"]["completion_tokens"] == 4


async def _load(server: Server, count: int, concurrency: int) -> list[int]:
    """Completion tokens of ``count`` streamed requests, every tenth abandoned half-way (-1)."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=300)
    gate = asyncio.Semaphore(concurrency)

    async def one(index: int) -> int:
        async with gate:
            stream = await client.completions.create(
                model=MODEL,
                prompt=f"{index % 7}" * (1 + index % 90),
                max_tokens=16 + index % 17,
                temperature=(0.0, 0.9)[index % 2],
                seed=index,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            seen = 0
            async for chunk in stream:
                seen += 1
                if index % 10 == 9 and seen == 3:
                    break
                if chunk.usage:
                    return int(chunk.usage.completion_tokens)
            await stream.close()  # the client hangs up
            return -1

    return list(await asyncio.gather(*(one(index) for index in range(count))))


def test_load_with_clients_that_hang_up(server: Server) -> None:
    asyncio.run(_load(server, 40, 16))
    memory = [server.memory()]
    expected = [-1 if index % 10 == 9 else 16 + index % 17 for index in range(200)]
    for _ in range(2):
        assert asyncio.run(_load(server, 200, 16)) == expected
        memory.append(server.memory())
    assert server.process.poll() is None
    # Plain vLLM 0.32 touches new memory too, less and less: 108, then 69, then 32 MiB per load.
    first, second = np.diff(memory)
    assert second < max(0.8 * first, 16 * 2**20)
    deadline = time.monotonic() + 60
    while server.metric("vllm:num_requests_running"):
        assert time.monotonic() < deadline, "abandoned requests still run"
        time.sleep(0.5)


@pytest.mark.parametrize(
    ("speculative", "message"),
    [
        ({"method": "dyspec", "no_such": 1}, "unknown option 'no_such' (given 1)"),
        ({"method": "dyspec", "num_speculative_tokens": 0}, "given as 0"),
    ],
)
def test_malformed_options_are_refused_before_the_engine_starts(
    model: Path, speculative: dict[str, Any], message: str
) -> None:
    done = subprocess.run(
        serve_command(model, speculative), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert message in output
    assert "Options: num_speculative_tokens" in output
    assert "EngineCore" not in output
