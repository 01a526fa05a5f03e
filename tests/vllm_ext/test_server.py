# SPDX-License-Identifier: Apache-2.0
"""The real ``vllm serve`` with our method: requests, metrics, faults."""

from __future__ import annotations

import asyncio
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.vllm_ext.server import MAX_LEN, MODEL, Server, serve_command

pytestmark = pytest.mark.engine


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
    vllms = ("spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total")
    names = [
        *(f"vllm:{name}" for name in vllms),
        *(
            f"vllm_ext:{name}"
            for name in (
                "drafted_nodes_total",
                "accepted_tokens_total",
                "emitted_tokens_total",
                "request_steps_total",
                "steps_total",
                "drafting_seconds_total",
                "tree_size_count",
            )
        ),
    ]
    before = [server.metric(name) for name in names]
    for _ in range(10):  # whether drafts pay in the first answer is up to a busy machine
        server.complete(prompt="xyxyxyxyxyxyxyxyxyxyxyxy", max_tokens=100, ignore_eos=True)
        after = [server.metric(name) for name in names]
        if after[0] > before[0]:
            break
    (
        vllm_drafted,
        vllm_accepted,
        drafted,
        accepted,
        emitted,
        request_steps,
        steps,
        seconds,
        trees,
    ) = np.subtract(after, before)
    assert drafted == vllm_drafted > 0
    assert accepted == vllm_accepted
    assert emitted == request_steps + accepted
    assert steps > 0
    assert trees == request_steps
    assert 0 < seconds < 60


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
        leaves = index % 10 == 9
        async with gate:
            stream = await client.completions.create(
                model=MODEL,
                prompt=f"{index % 7}" * (1 + index % 90),
                # Too long to be over, and sent as one piece, before its client has left.
                max_tokens=2000 if leaves else 16 + index % 17,
                temperature=(0.0, 0.9)[index % 2],
                seed=index,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            seen = 0
            async for chunk in stream:
                seen += 1
                if leaves and seen == 3:
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
    # Once warm, 200 requests leave about a megabyte behind; a leak of 80 KiB each would fail.
    assert max(np.diff(memory)) < 16 * 2**20
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
    served_model: Path, speculative: dict[str, Any], message: str
) -> None:
    done = subprocess.run(
        serve_command(served_model, speculative),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert message in output
    assert "Options: num_speculative_tokens" in output
    assert "EngineCore" not in output
