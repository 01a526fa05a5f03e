# SPDX-License-Identifier: Apache-2.0
"""The middleware and the route, driven as raw ASGI with a stand-in for vLLM's server."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from starlette.responses import JSONResponse, Response, StreamingResponse
from vllm.exceptions import VLLMValidationError

from logits_processors.session import Record
from vllm_ext.constraints.admission import ATTRIBUTE
from vllm_ext.constraints.http import as_json, attach
from vllm_ext.constraints.records import RPC

RECORD = Record("x", [1, 2], [-0.5, -1.0], 3, 1, "complete")


class Engine:
    """Answers the RPC with one record per asked name and text."""

    def __init__(self, texts: int = 1) -> None:
        self.texts = texts
        self.asked: list[str] = []
        self.input_processor = SimpleNamespace()
        self.broken = False

    async def collective_rpc(self, method: str, args: Any) -> Any:
        assert method == RPC
        if self.broken:
            raise RuntimeError("engine is gone")
        self.asked += args[0]
        fields = vars(RECORD)
        return [[fields | {"id": name} for name in args[0] for _ in range(self.texts)]] * 2


def serve(answer: Callable[[bytes], Response], engine: Any = None) -> TestClient:
    app = FastAPI()
    seen: list[bytes] = []

    @app.post("/v1/completions")
    @app.post("/v1/chat/completions")
    @app.post("/v1/responses")
    async def complete(request: Request) -> Response:
        body = await request.body()
        assert int(request.headers["content-length"]) == len(body)
        seen.append(body)
        return answer(body)

    attach(app)
    app.state.vllm_ext_engine = engine or Engine()
    client = TestClient(app)
    client.seen = seen  # type: ignore[attr-defined]
    return client


def ask(client: TestClient, path: str = "/v1/completions", **arguments: Any) -> Any:
    keys = {f"constraint_{key}": value for key, value in arguments.items()} or {
        "constraint_regex": "a"
    }
    return client.post(path, json={"prompt": "p", "vllm_xargs": keys})


def plain(_: bytes) -> Response:
    return JSONResponse({"id": "c", "choices": [{"text": "a"}]}, headers={"x-kept": "1"})


def streamed(*chunks: bytes) -> Callable[[bytes], Response]:
    def answer(_: bytes) -> Response:
        return StreamingResponse(iter(chunks), media_type="text/event-stream")

    return answer


def events(body: bytes) -> list[Any]:
    found = [line for line in body.split(b"\n") if line]
    assert all(line.startswith(b"data: ") for line in found)
    return [
        "DONE" if line == b"data: [DONE]" else json.loads(line.removeprefix(b"data: "))
        for line in found
    ]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("texts", [1, 3])
def test_the_field_in_a_plain_answer(path: str, texts: int) -> None:
    engine = Engine(texts)
    answer = ask(serve(plain, engine), path, regex="a", id="mine")
    assert answer.status_code == 200
    assert answer.headers["x-kept"] == "1"
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert answer.json()["choices"] == [{"text": "a"}]
    assert answer.json()["constraint"] == [as_json(RECORD) | {"id": "mine"}] * texts
    assert engine.asked == ["mine"]


def test_requests_without_a_name_get_one_each() -> None:
    engine = Engine()
    client = serve(plain, engine)
    ids = [ask(client).json()["constraint"][0]["id"] for _ in range(2)]
    assert engine.asked == ids
    assert len(set(ids)) == 2
    for body, name in zip(client.seen, ids, strict=True):  # type: ignore[attr-defined]
        sent = json.loads(body)
        assert sent["vllm_xargs"] == {"constraint_regex": "a", "constraint_id": name}
        assert sent["prompt"] == "p"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", b'{"prompt": "p",  "x": 1.0}'),
        ("/v1/completions", b'{"vllm_xargs": {"other": 1}, "prompt": "about constraint_regex"}'),
        ("/v1/completions", b"constraint_ is no JSON"),
        ("/v1/completions", b'"constraint_"'),
        ("/v1/completions", b'["constraint_"]'),
        ("/v1/completions", b'{"vllm_xargs": ["constraint_regex"]}'),
        ("/v1/completions", b'{"vllm_xargs": {"constraint_regex": "a", "constraint_id": 5}}'),
        ("/v1/completions", b'{"vllm_xargs": {"constraint_' + b"[" * 100_000),
        ("/v1/completions", b""),
        ("/v1/completions", b"\xff\xfe constraint_"),
        ("/v1/completions", b'{"prompt": "' + b"x" * 3_000_000 + b'"}'),
        ("/v1/completions", b'{"sampling_params": {"extra_args": ["constraint_regex"]}}'),
        ("/v1/responses", b'{"vllm_xargs": {"constraint_regex": "a"}}'),
        ("/v1/responses", b'{"sampling_params": {"extra_args": {"constraint_regex": "a"}}}'),
    ],
)
def test_other_requests_pass_byte_for_byte(path: str, body: bytes) -> None:
    engine = Engine()
    client = serve(plain, engine)
    answer = client.post(path, content=body)
    assert client.seen == [body]  # type: ignore[attr-defined]
    assert answer.content == plain(b"").body
    assert engine.asked == []


def test_big_constrained_requests_arrive_whole() -> None:
    client = serve(plain)
    body = {
        "prompt": "x" * 3_000_000,
        "vllm_xargs": {"constraint_regex": "é", "constraint_id": "i"},
    }
    assert client.post("/v1/completions", json=body).json()["constraint"][0]["id"] == "i"
    assert json.loads(client.seen[0]) == body  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [JSONResponse, StreamingResponse])
def test_refusals_pass_untouched(kind: Any) -> None:
    content = b'{"error": {"message": "no", "code": 400}}'

    def refuse(_: bytes) -> Response:
        if kind is JSONResponse:
            return Response(content, 400, media_type="application/json")
        return StreamingResponse(iter([content]), 400, media_type="text/event-stream")

    engine = Engine()
    answer = ask(serve(refuse, engine))
    assert (answer.status_code, answer.content) == (400, content)
    assert engine.asked == []


def test_an_answer_that_is_no_json_passes() -> None:
    answer = ask(serve(lambda _: Response(b"text", media_type="text/plain")))
    assert answer.content == b"text"


FIRST = (
    b'data: {"id": "c", "object": "o", "created": 1, "model": "m", "choices": [{"text": "a"}]}\n\n'
)
# Generated text may spell the end of a stream; it stays inside its event.
SPELT = b'data: {"id": "c", "model": "m", "choices": [{"text": "data: [DONE]"}]}\n\n'
DONE = b"data: [DONE]\n\n"


def cuts(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


@pytest.mark.parametrize(
    "chunks",
    [
        [FIRST, SPELT, DONE],
        [FIRST + SPELT + DONE],
        cuts(FIRST + SPELT + DONE, 1),
        cuts(FIRST + SPELT + DONE, 7),
        [FIRST, SPELT[:-1], SPELT[-1:] + DONE[:9], DONE[9:]],
        [FIRST, SPELT, DONE.rstrip()],
        [(FIRST + SPELT + DONE).replace(b"\n", b"\r\n")],
    ],
)
def test_the_field_comes_before_the_end_of_a_stream(chunks: Sequence[bytes]) -> None:
    engine = Engine()
    answer = ask(serve(streamed(*chunks), engine), id="mine", regex="a")
    *before, field, done = events(answer.content.replace(b"\r", b""))
    assert done == "DONE"
    assert before == events(FIRST + SPELT)
    assert field == {
        "id": "c",
        "model": "m",
        "choices": [],
        "constraint": [as_json(RECORD) | {"id": "mine"}],
    }
    assert engine.asked == ["mine"]


def test_a_stream_without_an_end_is_passed_on() -> None:
    engine = Engine()
    answer = ask(serve(streamed(FIRST, b"data: {unfinish"), engine))
    assert answer.content == FIRST + b"data: {unfinish"
    assert engine.asked == []


def test_events_are_not_held_back() -> None:
    """Raw ASGI: each whole event leaves before the next is made."""
    order: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for event in (FIRST, SPELT, DONE):
            order.append("made")
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def note(message: Any) -> None:
        order.append(message.get("body", message["type"]))

    drive(app, note)
    assert order[:4] == ["http.response.start", "made", FIRST, "made"]
    assert order[4] == SPELT
    assert order[-1] == b""


def drive(
    app: Any, note: Callable[[Any], None], *incoming: Any, kind: bytes = b"application/json"
) -> None:
    """Run the middleware over ``app`` with a constrained request."""
    from vllm_ext.constraints.http import ConstraintMiddleware

    body = json.dumps({"vllm_xargs": {"constraint_regex": "a"}}).encode()
    messages = list(incoming) or [
        {"type": "http.request", "body": body[:9], "more_body": True},
        {"type": "http.request", "body": body[9:], "more_body": False},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        note(message)

    state = SimpleNamespace(state=SimpleNamespace(vllm_ext_engine=Engine()))
    scope = {
        "type": "http", "method": "POST", "path": "/api/v1/completions", "root_path": "/api",
        "headers": [(b"content-length", b"1"), (b"content-type", kind)], "app": state,
    }  # fmt: skip
    asyncio.run(ConstraintMiddleware(app)(scope, receive, send))


def test_a_client_that_hangs_up_is_heard() -> None:
    heard = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert json.loads((await receive())["body"])["vllm_xargs"]["constraint_id"]
        heard.append(await receive())

    drive(app, lambda message: None)
    assert heard == [{"type": "http.disconnect"}]


def test_half_a_request_is_not_taken_for_a_whole() -> None:
    heard = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        heard.extend([await receive(), await receive()])

    cut = [{"type": "http.request", "body": b"{}", "more_body": True}, {"type": "http.disconnect"}]
    drive(app, lambda message: None, *cut)
    assert heard == cut


def test_a_lost_record_does_not_cost_the_text() -> None:
    engine = Engine()
    engine.broken = True
    assert ask(serve(plain, engine)).json() == {
        "id": "c", "choices": [{"text": "a"}], "constraint": None,
    }  # fmt: skip
    assert events(ask(serve(streamed(FIRST, DONE), engine)).content)[-1] == "DONE"


def test_a_beam_search_takes_no_constraint() -> None:
    client = serve(plain)
    body = {"use_beam_search": True, "vllm_xargs": {"constraint_regex": "a"}}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "use_beam_search"
    assert client.post("/v1/completions", json={"use_beam_search": True}).status_code == 200


class Judge:
    """Admission that knows two constraints by name."""

    def __init__(self) -> None:
        self.prepared: list[str] = []

    async def prepare(self, arguments: Any) -> None:
        source = arguments.get("constraint_regex", "")
        self.prepared.append(source)
        if source == "slow":
            raise TimeoutError("busy")

    def check(self, params: Any) -> None:
        source = params.extra_args.get("constraint_regex", "")
        assert source in self.prepared
        if source == "bad":
            raise VLLMValidationError("no", parameter="extra_args.constraint_regex")


def judged() -> Engine:
    engine = Engine()
    setattr(engine.input_processor, ATTRIBUTE, Judge())
    return engine


PATHS = ["/v1/completions", "/v1/chat/completions", "/v1/responses"]


@pytest.mark.parametrize("path", PATHS)
def test_constraints_are_vetted_before_vllm_validates(path: str) -> None:
    engine = judged()
    client = serve(plain, engine)
    assert ask(client, path, regex="a").status_code == 200
    busy = ask(client, path, regex="slow")
    assert (busy.status_code, busy.json()["error"]["message"]) == (503, "busy")
    assert getattr(engine.input_processor, ATTRIBUTE).prepared == ["a", "slow"]
    assert len(client.seen) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("more", [{}, {"stream": True}, {"background": True}])
@pytest.mark.parametrize("place", ["vllm_xargs", "sampling_params"])
@pytest.mark.parametrize(
    ("keys", "options", "parameter"),
    [
        ({"constraint_regx": "a"}, {}, "extra_args.constraint_regx"),
        ({"constraint_regex": "bad"}, {}, "extra_args.constraint_regex"),
        ({"constraint_regex": "a"}, {"min_p": 0.1}, "min_p"),
        ({"mirostat_version": 3}, {}, "extra_args.mirostat_version"),
        ({"momentum_alpha": "much"}, {}, "extra_args.momentum_alpha"),
        ({"constraint_regex": "a", "constraint_seed": 1}, {"n": 2}, "n"),
    ],
)
def test_bad_requests_are_refused_before_an_answer_begins(
    path: str,
    more: dict[str, Any],
    place: str,
    keys: dict[str, Any],
    options: dict[str, Any],
    parameter: str,
) -> None:
    body = {**options, "vllm_xargs": keys}
    if place == "sampling_params":
        body = {place: {**options, "extra_args": keys}}
    client = serve(plain, judged())
    answer = client.post(path, json={**body, **more})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, parameter)
    assert client.seen == []  # type: ignore[attr-defined]


def test_keys_in_escapes_are_keys() -> None:
    body = json.dumps({"stream": True, "vllm_xargs": {"constraint_regex": "bad"}})
    hidden = body.replace("constraint", r"\u0063\u006fnstraint")
    assert json.loads(hidden) == json.loads(body)
    client = serve(plain, judged())
    assert client.post("/v1/responses", content=hidden).status_code == 400
    assert client.post("/v1/responses", content=hidden.replace("bad", "a")).status_code == 200


def test_uploads_are_not_read() -> None:
    read: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        read.append(await receive())

    first = {"type": "http.request", "body": b"constraint_", "more_body": True}
    drive(app, lambda message: None, first, kind=b"multipart/form-data; boundary=x")
    assert read == [first]


def test_small_processors_leave_no_record() -> None:
    engine = Engine()
    admission = Mock(prepare=AsyncMock())
    setattr(engine.input_processor, ATTRIBUTE, admission)
    client = serve(streamed(FIRST, DONE), engine)
    body = {"stream": True, "vllm_xargs": {"mirostat_version": 2}}
    answer = client.post("/v1/completions", json=body)
    assert answer.content == FIRST + DONE
    admission.check.assert_called_once()
    assert json.loads(client.seen[0]) == body  # type: ignore[attr-defined]


@pytest.mark.parametrize("odd", [{"n": "two"}, {"n": None}, {"temperature": None}, {"min_p": None}])
def test_odd_values_in_a_stream_are_left_to_vllm(odd: dict[str, Any]) -> None:
    engine = Engine()
    setattr(engine.input_processor, ATTRIBUTE, Mock(prepare=AsyncMock()))
    body = {**odd, "stream": True, "vllm_xargs": {"constraint_regex": "a", "constraint_seed": 1}}
    assert serve(plain, engine).post("/v1/completions", json=body).status_code == 200


def test_the_route_hands_out_records() -> None:
    engine = Engine(2)
    client = serve(plain, engine)
    answer = client.get("/v1/constraints/results", params={"id": ["a", "b"]}).json()
    assert list(answer["results"]) == ["a", "b"]
    assert [record["id"] for record in answer["results"]["a"]] == ["a", "a"]
    assert answer["results"]["a"][0]["log_weight"] == -1.5
    assert client.get("/v1/constraints/results").status_code == 422


def test_a_server_without_an_engine_says_so() -> None:
    client = serve(plain)
    client.app.state.vllm_ext_engine = None  # type: ignore[attr-defined]
    assert client.get("/v1/constraints/results?id=a").status_code == 503


@pytest.mark.parametrize("weights", [[-math.inf], [0.0, math.nan], [math.inf]])
def test_json_has_no_infinities(weights: list[float]) -> None:
    record = Record("x", [1] * len(weights), weights, 0, 0, "complete")
    answer = as_json(record)
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer
    assert answer["log_weight"] is None
    assert answer["log_weights"][-1] is None


@pytest.mark.parametrize("state", ["incomplete", "dead_end", "restart", "error"])
def test_only_complete_texts_have_a_weight(state: Any) -> None:
    assert as_json(Record("x", [1], [-1.0], 0, 0, state))["log_weight"] is None
    assert as_json(RECORD)["log_weight"] == -1.5
