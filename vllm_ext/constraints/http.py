# SPDX-License-Identifier: Apache-2.0
"""Results over HTTP: an endpoint plugin of vLLM's API server, loaded where ``VLLM_PLUGINS`` allows.

``GET /v1/constraints/results?id=ID`` hands out records, and the answers of the completion
endpoints get a field ``constraint`` of their own. vLLM offers plugins no way into its response
models, so the field is added on the wire, in a middleware that leaves all other requests alone.
"""

from __future__ import annotations

import json
import math
import uuid
from argparse import Namespace
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logits_processors.request import PREFIXES
from logits_processors.session import Record
from vllm_ext.constraints.records import RPC, merge_replies

_PATHS = ("/v1/completions", "/v1/chat/completions")
_DONE = b"data: [DONE]"


class ConstraintEndpoints:
    """The plugin, as vLLM's ``EndpointPlugin`` protocol wants it."""

    name = "vllm_ext"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the route and the middleware."""
        app.add_api_route("/v1/constraints/results", _results, methods=["GET"])
        app.add_middleware(ConstraintField)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Remember the engine."""
        state.vllm_ext_engine = engine_client


async def _results(request: Request, id: Annotated[list[str], Query()]) -> dict[str, Any]:
    """Return and forget the records of the given ``constraint_id``s."""
    engine = request.app.state.vllm_ext_engine
    if engine is None:
        raise HTTPException(503, "this server has no engine")
    found = await _fetch(engine, id)
    return {"results": {name: [as_json(r) for r in records] for name, records in found.items()}}


async def _fetch(engine: Any, names: Sequence[str]) -> dict[str, list[Record]]:
    replies = await engine.collective_rpc(RPC, args=(list(names),))
    return merge_replies(list(names), replies)


def as_json(record: Record) -> dict[str, Any]:
    """Return a record as strict JSON; ``null`` stands for the log of a weight 0."""
    weights = [weight if math.isfinite(weight) else None for weight in record.log_weights]
    known = record.state == "complete" and None not in weights
    return {
        **vars(record),
        "log_weights": weights,
        "log_weight": math.fsum(record.log_weights) if known else None,
    }


class ConstraintField:
    """Adds ``constraint`` to the answers of constrained requests.

    Args:
        app: the application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or scope["path"] not in _PATHS or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body = await _read(receive)
        name, body = _named(body)
        replay = _replay(body, receive)
        if name is None:
            await self._app(scope, replay, send)
            return
        # The length of the body may have changed with the name.
        headers = [(k, v) for k, v in scope["headers"] if k != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        engine = scope["app"].state.vllm_ext_engine
        writer = _Writer(send, engine, name)
        await self._app({**scope, "headers": headers}, replay, writer.send)


def _named(body: bytes) -> tuple[str | None, bytes]:
    """Return the request's id, made up if it has none, and the body with it.

    ``None`` for what is not a constrained request, whose body stays as it is.
    """
    try:
        request = json.loads(body)
        arguments = request["vllm_xargs"]
        ours = any(key.startswith(PREFIXES[0]) for key in arguments)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None, body  # vLLM says what is wrong with it
    if not ours:
        return None, body
    name = arguments.setdefault("constraint_id", uuid.uuid4().hex)
    if not isinstance(name, str):
        return None, body
    return name, json.dumps(request).encode()


class _Writer:
    """Passes a response on, with the field added."""

    def __init__(self, send: Send, engine: Any, name: str) -> None:
        self._send = send
        self._engine = engine
        self._name = name
        self._start: Message | None = None
        self._body = b""
        self._streams = False
        self._last: dict[str, Any] = {}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = dict(message["headers"])
            self._streams = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            if self._streams or message["status"] != 200:
                await self._send(message)
            else:
                self._start = message
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._streams:
            await self._send({**message, "body": await self._event(message.get("body", b""))})
        elif self._start is None:
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._finish()

    async def _event(self, chunk: bytes) -> bytes:
        """Put an event with the field before the one that ends the stream."""
        before, done, after = chunk.partition(_DONE)
        for line in before.splitlines():
            if line.startswith(b"data: {"):
                try:
                    self._last = json.loads(line[len(b"data: ") :])
                except ValueError:
                    continue  # an event cut in two by the transport
        if not done:
            return chunk
        shared = {k: v for k, v in self._last.items() if k in ("id", "object", "created", "model")}
        event = {**shared, "choices": [], "constraint": await self._field()}
        added = b"data: " + json.dumps(event).encode() + b"\n\n"
        return bytes(before + added + done + after)

    async def _finish(self) -> None:
        assert self._start is not None
        answer = json.loads(self._body)
        answer["constraint"] = await self._field()
        body = json.dumps(answer).encode()
        headers = [(k, v) for k, v in self._start["headers"] if k != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def _field(self) -> list[dict[str, Any]]:
        found = await _fetch(self._engine, [self._name])
        return [as_json(record) for record in found[self._name]]


async def _read(receive: Receive) -> bytes:
    body: bytes = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return body
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives ``body`` first and then what really comes (a hang-up)."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
