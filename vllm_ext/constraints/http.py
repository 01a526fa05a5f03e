# SPDX-License-Identifier: Apache-2.0
"""Constraints over HTTP, in vLLM's API server.

Bad requests are refused before vLLM sees them, for it answers 200 before it validates a stream;
good ones find their constraint compiled. The answers of the completion endpoints get a field
``constraint``: vLLM offers plugins no way into its response models, so it is added on the wire, in
a middleware that leaves all other requests alone. ``GET /v1/constraints/results?id=ID`` hands out
the records of requests to the other endpoints.
"""

from __future__ import annotations

import json
import logging
import math
import uuid
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.exceptions import VLLMValidationError

from logits_processors.session import Record
from logits_processors.vllm_params import check_params
from vllm_ext.constraints import bodies
from vllm_ext.constraints.admission import ATTRIBUTE
from vllm_ext.constraints.records import RPC, merge_replies

logger = logging.getLogger("vllm.vllm_ext")

_WITH_FIELD = ("/v1/completions", "/v1/chat/completions")
_DATA = b"data: "
_DONE = b"data: [DONE]"


def attach(app: FastAPI) -> None:
    """Add the route and the middleware."""
    app.add_api_route("/v1/constraints/results", _results, methods=["GET"])
    app.add_middleware(ConstraintMiddleware)


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


class ConstraintMiddleware:
    """Refuses bad requests to our processors, and adds ``constraint`` to the answers of good ones.

    Args:
        app: the application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if not bodies.may_be_ours(scope):
            await self._app(scope, receive, send)
            return
        messages = await _read(receive)
        asked = bodies.find(b"".join(message.get("body", b"") for message in messages))
        if asked is None:
            await self._app(scope, _replay(messages, receive), send)
            return
        engine = scope["app"].state.vllm_ext_engine
        refusal = await _refusal(asked, engine)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        if not asked.constrained or _path(scope) not in _WITH_FIELD:
            await self._app(scope, _replay(messages, receive), send)
            return
        name = asked.arguments.get("constraint_id")
        if name is None:
            name = asked.arguments["constraint_id"] = uuid.uuid4().hex
            body = json.dumps(asked.request).encode()
            messages = [{"type": "http.request", "body": body, "more_body": False}]
            scope = {**scope, "headers": _with_length(scope["headers"], body)}
        writer = _Writer(send, engine, name)
        await self._app(scope, _replay(messages, receive), writer.send)


def _path(scope: Scope) -> str:
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


async def _refusal(asked: bodies.Asked, engine: Any) -> JSONResponse | None:
    """Return the answer to a request that must not reach vLLM, ``None`` for all others."""
    if asked.request.get("use_beam_search"):
        # vLLM drops the extra arguments of a beam search without a word.
        message = "a beam search takes none of our processors; leave one of the two out"
        return _error(400, "BadRequestError", "use_beam_search", message)
    admission = getattr(getattr(engine, "input_processor", None), ATTRIBUTE, None)
    if admission is not None:
        try:
            check_params(asked.params)
            await admission.prepare(asked.arguments)
            admission.check(asked.params)
        except TimeoutError as error:
            return _error(503, "ServiceUnavailableError", "extra_args", str(error))
        except VLLMValidationError as error:
            return _error(400, "BadRequestError", error.parameter, str(error))
    return None


def _error(code: int, kind: str, parameter: str | None, message: str) -> JSONResponse:
    error = {"message": message, "type": kind, "param": parameter, "code": code}
    return JSONResponse({"error": error}, code)


def _with_length(headers: Any, body: bytes) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in headers if name != b"content-length"]
    return [*kept, (b"content-length", str(len(body)).encode())]


class _Writer:
    """Passes a response on, with the field added."""

    def __init__(self, send: Send, engine: Any, name: str) -> None:
        self._send = send
        self._engine = engine
        self._name = name
        self._start: Message | None = None  # held back, because the length will change
        self._streams = False
        self._body = b""  # of an answer so far, or the unfinished line of a stream
        self._last = b"{}"  # event of a stream

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._streams = kind.startswith(b"text/event-stream")
            if message["status"] == 200 and kind.startswith(b"application/json"):
                self._start = message
            else:
                await self._send(message)
        elif message["type"] == "http.response.body" and self._streams:
            await self._send({**message, "body": await self._lines(message)})
        elif message["type"] == "http.response.body" and self._start is not None:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._finish(self._start)
        else:
            await self._send(message)

    async def _lines(self, message: Message) -> bytes:
        """Return the whole lines of a stream, an event with the field before the one that ends it.

        Transports cut events anywhere, and generated text may hold anything but a line break.
        """
        lines = (self._body + message.get("body", b"")).splitlines(keepends=True)
        more = message.get("more_body", False)
        self._body = lines.pop() if more and lines and not lines[-1].endswith(b"\n") else b""
        written = []
        for line in lines:
            if line.rstrip() == _DONE:
                last = json.loads(self._last)
                kept = {key: last[key] for key in _SHARED if key in last}
                event = {**kept, "choices": [], "constraint": await self._field()}
                written.append(_DATA + json.dumps(event).encode() + b"\n\n")
            elif line.startswith(_DATA + b"{"):
                self._last = line[len(_DATA) :]
            written.append(line)
        return b"".join(written)

    async def _finish(self, start: Message) -> None:
        answer = json.loads(self._body)
        answer["constraint"] = await self._field()
        body = json.dumps(answer).encode()
        await self._send({**start, "headers": _with_length(start["headers"], body)})
        await self._send({"type": "http.response.body", "body": body})

    async def _field(self) -> list[dict[str, Any]] | None:
        """Return the field; ``None`` if it could not be fetched, which must not cost the text."""
        try:
            found = await _fetch(self._engine, [self._name])
        except Exception:
            logger.exception("vllm-ext: the results of a constrained request are lost")
            return None
        return [as_json(record) for record in found[self._name]]


_SHARED = ("id", "object", "created", "model")


async def _read(receive: Receive) -> list[Message]:
    """Return the messages of a request's body, or those up to the moment the client hung up."""
    messages = [await receive()]
    while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
        messages.append(await receive())
    return messages


def _replay(messages: Sequence[Message], receive: Receive) -> Receive:
    """Return a ``receive`` that gives ``messages`` first and then what really comes (a hang-up)."""
    waiting = list(messages)

    async def replayed() -> Message:
        return waiting.pop(0) if waiting else await receive()

    return replayed
