# SPDX-License-Identifier: Apache-2.0
"""Constraints over HTTP, through the ``openai`` client, on a server that drafts token trees."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.error
import urllib.request
from typing import Any

import pytest

from tests.vllm_ext.server import MODEL, Server

pytestmark = pytest.mark.engine

REGEX = "[ab]{3,9}c"
SCHEMA = json.dumps(
    {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
)


def ask(server: Server, keys: dict[str, Any], **body: Any) -> dict[str, Any]:
    defaults = {"prompt": "abc", "temperature": 1.0, "seed": 3, "vllm_xargs": keys}
    return server.complete(**{**defaults, **body})


def test_the_answer_carries_its_weight(server: Server) -> None:
    answer = ask(server, {"constraint_regex": REGEX})
    choice = answer["choices"][0]
    (record,) = answer["constraint"]
    assert re.fullmatch(REGEX, choice["text"])
    assert record["state"] == "complete"
    assert record["log_weight"] == pytest.approx(sum(record["log_weights"]))
    assert record["log_weight"] < 0
    assert len(record["token_ids"]) == answer["usage"]["completion_tokens"]
    again = ask(server, {"constraint_regex": REGEX})
    assert again["choices"][0]["text"] == choice["text"]
    assert again["constraint"][0]["log_weight"] == pytest.approx(record["log_weight"], abs=1e-3)


def test_other_answers_have_no_such_field(server: Server) -> None:
    assert "constraint" not in server.complete(prompt="abc")
    assert "constraint" not in ask(server, {"mirostat_version": 2})


def test_results_by_id(server: Server) -> None:
    path = "/v1/constraints/results?id=mine&id=other"
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "abc"}],
        "max_tokens": 24,
        "seed": 4,
        "vllm_xargs": {"constraint_regex": REGEX, "constraint_id": "mine"},
    }
    request = urllib.request.Request(
        server.url + "/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        answer = json.load(reply)
    # The field of the answer has taken the record along; asking again finds nothing.
    assert answer["constraint"][0]["id"] == "mine"
    assert json.loads(server.get(path)) == {"results": {"mine": [], "other": []}}


def test_streams_and_several_texts(server: Server) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=server.url + "/v1", api_key="none")
    shared: dict[str, Any] = {"model": MODEL, "prompt": "abc", "max_tokens": 24, "seed": 6}
    stream = client.completions.create(
        **shared, stream=True, extra_body={"vllm_xargs": {"constraint_regex": REGEX}}
    )
    text, records = "", []
    for chunk in stream:
        text += "".join(choice.text for choice in chunk.choices)
        records += getattr(chunk, "constraint", None) or []
    assert re.fullmatch(REGEX, text)
    assert [record["state"] for record in records] == ["complete"]
    several = client.completions.create(
        **shared, n=4, temperature=2.0, extra_body={"vllm_xargs": {"constraint_regex": REGEX}}
    )
    texts = [choice.text for choice in several.choices]
    assert all(re.fullmatch(REGEX, text) for text in texts)
    assert len(set(texts)) > 1
    assert len(several.constraint) == 4  # type: ignore[attr-defined]


def test_a_stream_with_parameters_that_do_not_go_together_gets_400(server: Server) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(server, {"constraint_regex": REGEX}, stream=True, presence_penalty=0.5)
    assert error.value.code == 400
    assert json.load(error.value)["error"]["param"] == "presence_penalty"


def test_greedy_json_is_that_of_structured_outputs(server: Server) -> None:
    ours = ask(server, {"constraint_json_schema": SCHEMA}, temperature=0)
    vllms = server.complete(prompt="abc", structured_outputs={"json": json.loads(SCHEMA)}, seed=3)
    assert ours["choices"][0]["text"] == vllms["choices"][0]["text"]


# Compiles at once and explodes while it runs: 2^40 ways to read a text.
AMBIGUOUS = "\n".join(
    [
        'root ::= r0 "b"',
        *(f"r{i} ::= r{i + 1} | r{i + 1} r{i + 1}" for i in range(40)),
        'r40 ::= "a" | ""',
    ]
)
HOSTILE: dict[str, dict[str, Any]] = {
    "unknown key": {"constraint_regx": "a"},
    "wrong type": {"constraint_regex": 5},
    "two constraints": {"constraint_regex": "a", "constraint_ebnf": 'root ::= "a"'},
    "syntax": {"constraint_ebnf": "root ::= ("},
    "empty language": {"constraint_ebnf": "root ::= root"},
    "unknown predicate": {"constraint_predicate": "os.system"},
    "invalid schema": {"constraint_json_schema": '{"type": "nothing"}'},
    "deep": {"constraint_json_schema": '{"not":' * 5000 + "{}" + "}" * 5000},
    "explosive": {"constraint_ebnf": AMBIGUOUS},
    "backtracking": {"constraint_regex_partial": "(" * 300 + "a" + ")*" * 300},
    "prefix without prompt": {"constraint_regex": "a", "constraint_prefix": -1},
    "huge seed": {"constraint_regex": "a", "constraint_seed": 2**70},
    "method": {"constraint_regex": "a", "constraint_method": "mcmc"},
    "Mirostat's target": {"mirostat_version": 2, "mirostat_tau": -1.0},
    "Momentum's type": {"momentum_alpha": "much"},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_bad_and_hostile_requests_get_400(server: Server, name: str, stream: bool) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(server, HOSTILE[name], stream=stream)
    assert error.value.code == 400
    message = json.load(error.value)["error"]["message"]
    assert "constraint" in message or "extra_args" in message
    assert server.complete(prompt="abc")["choices"]


async def _mixed(server: Server, count: int) -> list[str]:
    """What became of ``count`` concurrent requests of every kind."""
    from openai import AsyncOpenAI, BadRequestError

    client = AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=300)
    kinds: list[dict[str, Any] | None] = [
        {"constraint_regex": REGEX},
        {"constraint_json_schema": SCHEMA, "constraint_method": "masking"},
        {"constraint_predicate": "even", "constraint_method": "awrs"},
        {"constraint_regex": "[ab]{1,3}", "constraint_method": "asap"},
        None,
        {"constraint_ebnf": "root ::= root"},
        {"constraint_predicate": "failing"},
        {"mirostat_version": 2, "mirostat_tau": 3.0},
        {"constraint_lark": 'start: "x" /[0-9]{1,6}/ "y"'},
        {"constraint_regex": "[a-z]{200,}"},
    ]

    async def one(index: int) -> str:
        keys = kinds[index % len(kinds)]
        state, seen = "plain", 0
        try:
            stream = await client.completions.create(
                model=MODEL,
                prompt="abc" * (1 + index % 30),
                max_tokens=24,
                temperature=1.0,
                seed=index,
                stream=True,
                extra_body={"vllm_xargs": keys} if keys else {},
            )
            async for chunk in stream:
                seen += 1
                if index % 10 == 9 and seen == 3:
                    await stream.close()
                    return "hung up"
                for record in getattr(chunk, "constraint", None) or []:
                    state = record["state"]
        except BadRequestError as error:
            return "refused" if "constraint_ebnf" in str(error) else str(error)
        return state

    return list(await asyncio.gather(*(one(index) for index in range(count))))


def test_a_hundred_mixed_requests_at_once(server: Server) -> None:
    states = asyncio.run(_mixed(server, 100))
    assert set(states[0::10]) == {"complete"}
    assert set(states[4::10]) == {"plain"}
    assert set(states[5::10]) == {"refused"}
    assert set(states[6::10]) == {"error"}
    assert set(states[7::10]) == {"plain"}
    assert set(states[9::10]) == {"hung up"}
    for kind in (1, 2, 3, 8):
        assert set(states[kind::10]) <= {"complete", "incomplete", "dead_end"}
        assert kind == 2 or "complete" in states[kind::10]  # odd numbers are dead ends
    assert server.process.poll() is None
    assert ask(server, {"constraint_regex": REGEX})["constraint"][0]["state"] == "complete"
