# SPDX-License-Identifier: Apache-2.0
"""Constraints over HTTP, through the ``openai`` client, on a server that drafts token trees."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
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


def post(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return dict(json.load(reply))


def results(server: Server, *names: str) -> dict[str, Any]:
    path = "/v1/constraints/results?" + "&".join(f"id={name}" for name in names)
    return dict(json.loads(server.get(path))["results"])


MESSAGES = [{"role": "user", "content": "abc"}]
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "abc", "max_tokens": 24},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 24},
    "/v1/chat/completions/batch": {"messages": [MESSAGES], "max_tokens": 24},
    "/v1/responses": {"input": "abc", "max_output_tokens": 24},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 24},
    "/inference/v1/generate": {"token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 24}},
}
WITH_FIELD = ("/v1/completions", "/v1/chat/completions")


def body_of(route: str, keys: dict[str, Any], **more: Any) -> dict[str, Any]:
    body = {"model": MODEL, **ROUTES[route], **more}
    if "sampling_params" in body:
        body["sampling_params"] = {**body["sampling_params"], "extra_args": keys}
    else:
        body["vllm_xargs"] = keys
    return body


def skip_if_absent(server: Server, route: str) -> None:
    """Skip where an older vLLM has no such route, or one without extra arguments."""
    served = json.loads(server.get("/openapi.json"))
    if route not in served["paths"]:
        pytest.skip(f"this vLLM does not serve {route}")
    content = served["paths"][route]["post"]["requestBody"]["content"]["application/json"]
    schema = served["components"]["schemas"][content["schema"]["$ref"].rsplit("/", 1)[1]]
    named = {"vllm_xargs", "sampling_params"} & schema["properties"].keys()
    if not named and not schema.get("additionalProperties"):
        pytest.skip(f"{route} of this vLLM takes no extra arguments")


@pytest.mark.parametrize("route", ROUTES)
def test_results_by_id(server: Server, route: str) -> None:
    """Handed out once: in the answer where it has the field, by the endpoint elsewhere."""
    skip_if_absent(server, route)
    answer = post(server, route, body_of(route, {"constraint_regex": REGEX, "constraint_id": "r"}))
    found = results(server, "r", "other")
    assert found["other"] == []
    if route in WITH_FIELD:
        assert found["r"] == []
        (record,) = answer["constraint"]
    else:
        assert "constraint" not in answer
        (record,) = found["r"]
    assert (record["id"], record["state"]) == ("r", "complete")
    assert len(record["token_ids"]) == len(record["log_weights"]) > 4
    assert results(server, "r") == {"r": []}


def test_a_response_obeys_its_constraint(server: Server) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=server.url + "/v1", api_key="none")
    answer = client.responses.create(
        model=MODEL,
        input="abc",
        max_output_tokens=24,
        extra_body={"vllm_xargs": {"constraint_regex": REGEX}},
    )
    assert answer.status == "completed"
    assert re.fullmatch(REGEX, answer.output_text)


@pytest.mark.parametrize(
    ("route", "more", "end"),  # a grammar for each, because verdicts are remembered
    [
        ("/v1/chat/completions", {}, "c"),
        ("/v1/chat/completions/batch", {}, "d"),
        ("/v1/responses", {}, "e"),
        ("/v1/responses", {"stream": True}, "f"),
        ("/v1/messages", {"stream": True}, "g"),
        ("/inference/v1/generate", {}, "h"),
    ],
)
def test_a_hostile_grammar_holds_up_nobody(
    server: Server, route: str, more: dict[str, Any], end: str
) -> None:
    skip_if_absent(server, route)
    grammar = AMBIGUOUS.replace('"b"', f'"{end}"')
    body = body_of(route, {"constraint_ebnf": grammar}, **more)
    answered: list[Any] = []

    def ask_hostile() -> None:
        try:
            answered.append(post(server, route, body))
        except urllib.error.HTTPError as error:
            answered.append((error.code, json.load(error)["error"]))

    hostile = threading.Thread(target=ask_hostile)
    hostile.start()
    in_time = 0
    while hostile.is_alive():
        server.get("/health")
        in_time += hostile.is_alive()
        time.sleep(0.05)
    hostile.join()
    ((code, error),) = answered
    assert (code, error["param"]) == (400, "extra_args.constraint_ebnf")
    assert in_time >= 3  # a server that waits for the compilation answers after it


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


def test_two_texts_in_one_stream(server: Server) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=server.url + "/v1", api_key="none")
    stream = client.completions.create(
        model=MODEL,
        prompt="abc",
        max_tokens=24,
        seed=6,
        temperature=2.0,
        n=2,
        stream=True,
        extra_body={"vllm_xargs": {"constraint_regex": REGEX}},
    )
    texts, records = ["", ""], []
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
        records.append(getattr(chunk, "constraint", None))
    assert all(re.fullmatch(REGEX, text) for text in texts)
    assert texts[0] != texts[1]
    (both,) = filter(None, records)  # one event, behind both texts
    assert [record["state"] for record in both] == ["complete"] * 2
    assert sorted(len(r["token_ids"]) - 1 for r in both) == sorted(map(len, texts))


def test_an_empty_language_that_cannot_be_told_is_a_dead_end(server: Server) -> None:
    (record,) = ask(server, {"constraint_regex_partial": "a(?!b)b"})["constraint"]
    assert record["state"] == "dead_end"
    assert record["log_weight"] is None


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
KEYS = "extra_args"
HOSTILE: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown key": (
        {"constraint_regx": "a"},
        f"{KEYS}.constraint_regx",
        "constraint_regx: unknown key",
    ),
    "wrong type": (
        {"constraint_regex": 5},
        f"{KEYS}.constraint_regex",
        "constraint_regex given as 5",
    ),
    "two constraints": (
        {"constraint_regex": "a", "constraint_ebnf": 'root ::= "a"'},
        f"{KEYS}.constraint_regex",
        "constraint_ebnf and constraint_regex given",
    ),
    "EBNF": ({"constraint_ebnf": "root ::= ("}, f"{KEYS}.constraint_ebnf", "line 1, column 11"),
    "Lark": ({"constraint_lark": "start: ("}, f"{KEYS}.constraint_lark", "line 1, column 9"),
    "regex": ({"constraint_regex": "(a"}, f"{KEYS}.constraint_regex", "line 1, column 3"),
    "regex_partial": (
        {"constraint_regex_partial": "(a"},
        f"{KEYS}.constraint_regex_partial",
        "line 1, column 3",
    ),
    "JSON": ({"constraint_json_schema": "{"}, f"{KEYS}.constraint_json_schema", "line 1 column 2"),
    "empty EBNF": ({"constraint_ebnf": "root ::= root"}, f"{KEYS}.constraint_ebnf", "no "),
    "empty Lark": (
        {"constraint_lark": 'start: "a" start'},
        f"{KEYS}.constraint_lark",
        "no finite text",
    ),
    "unknown predicate": (
        {"constraint_predicate": "os.system"},
        f"{KEYS}.constraint_predicate",
        "registered: even, failing",
    ),
    "invalid schema": (
        {"constraint_json_schema": '{"type": "nothing"}'},
        f"{KEYS}.constraint_json_schema",
        'Unsupported type "nothing"',
    ),
    "deep": (
        {"constraint_json_schema": '{"not":' * 5000 + "{}" + "}" * 5000},
        f"{KEYS}.constraint_json_schema",
        "max_depth",
    ),
    "explosive": ({"constraint_ebnf": AMBIGUOUS}, f"{KEYS}.constraint_ebnf", "_seconds"),
    "backtracking": (
        {"constraint_regex_partial": "(" * 300 + "a" + ")*" * 300},
        f"{KEYS}.constraint_regex_partial",
        "max_depth",
    ),
    "prefix without prompt": (
        {"constraint_regex": "a", "constraint_prefix": -1},
        f"{KEYS}.constraint_prefix",
        "constraint_prefix given as -1",
    ),
    "huge seed": (
        {"constraint_regex": "a", "constraint_seed": 2**70},
        f"{KEYS}.constraint_seed",
        "constraint_seed",
    ),
    "method": (
        {"constraint_regex": "a", "constraint_method": "mcmc"},
        f"{KEYS}.constraint_method",
        "'awrs', 'masking'",
    ),
    "Mirostat's target": (
        {"mirostat_version": 2, "mirostat_tau": -1.0},
        f"{KEYS}.mirostat_tau",
        "mirostat_tau",
    ),
    "Momentum's type": ({"momentum_alpha": "much"}, f"{KEYS}.momentum_alpha", "momentum_alpha"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_bad_and_hostile_requests_get_400(server: Server, name: str, stream: bool) -> None:
    from openai import BadRequestError, OpenAI

    client = OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    keys, parameter, message = HOSTILE[name]
    with pytest.raises(BadRequestError) as refusal:
        client.completions.create(
            model=MODEL, prompt="abc", stream=stream, extra_body={"vllm_xargs": keys}
        )
    assert refusal.value.param == parameter
    assert message in refusal.value.message
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
