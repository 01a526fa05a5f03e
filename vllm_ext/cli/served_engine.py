# SPDX-License-Identifier: Apache-2.0
"""An engine behind HTTP: what `EngineProcess` is offline, with requests sent by the openai client.

Prompts are sent as token ids, so that both modes of the benchmark ask the same; latencies are
those that the client sees.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_ext.cli.counters import Counters
from vllm_ext.cli.engine_types import (
    Completion,
    EngineConfig,
    EngineError,
    GenerateResult,
    RequestResult,
)
from vllm_ext.cli.server_process import ServerProcess

if TYPE_CHECKING:
    from openai import AsyncOpenAI

SERVER_OPTIONS = {
    "host": "127.0.0.1",
    # Requests mean what they say: no defaults from the model's generation_config.json.
    "generation_config": "vllm",
}


class ServedEngine:
    """A context manager around one server; every call blocks until all is answered."""

    def __init__(self, config: EngineConfig) -> None:
        """Start the server and wait until it is ready.

        Raises:
            EngineError: The server did not start; the message holds the end of its log.
        """
        self._config = config
        self._start()

    def restart(self) -> None:
        """Stop the server, halted or not, and start it anew; raises as the constructor does."""
        self.close()
        self._start()

    def _start(self) -> None:
        from openai import AsyncOpenAI

        config = self._config
        self._server = ServerProcess(EngineConfig({**config.llm, **SERVER_OPTIONS}, config.env))
        self._loop = asyncio.Runner()  # one for all calls: the client belongs to it
        # A long answer on a slow machine is no reason to ask again, which would count twice. And a
        # server that was halted for longer than it keeps connections closes them when it goes on,
        # possibly with the next request in them.
        self._client = AsyncOpenAI(
            base_url=f"{self._server.url}/v1",
            api_key="none",
            max_retries=0,
            timeout=None,
            default_headers={"Connection": "close"},
        )

    def encode(self, rows: Sequence[str | list[dict[str, Any]]], *, raw: bool) -> list[list[int]]:
        """Token ids of each row, by the server's tokenizer; as `EngineProcess.encode`."""
        return [self._encode(row, raw=raw) for row in rows]

    def _encode(self, row: str | list[dict[str, Any]], *, raw: bool) -> list[int]:
        if isinstance(row, str) and raw:
            body: dict[str, Any] = {"prompt": row}
        else:
            messages = [{"role": "user", "content": row}] if isinstance(row, str) else row
            body = {"messages": messages, "add_generation_prompt": True}
        answer = self._server.post("/tokenize", {"model": self._server.name, **body})
        ids: list[int] = answer["tokens"]
        return ids

    def generate(
        self, prompts: Sequence[list[int]], params: Sequence[dict[str, Any]]
    ) -> GenerateResult:
        """Send all prompts at once and read their streams; `params` are fields of a request.

        Raises:
            EngineError: The server refused a request.
            EngineDiedError: The server does not answer.
        """
        import openai

        before = self._counters()
        try:
            start = time.perf_counter()
            requests = self._loop.run(self._stream_all(prompts, params))
            wall = time.perf_counter() - start
        except openai.APIError as error:
            if isinstance(error, openai.APIStatusError) and error.status_code < 500:
                raise EngineError(f"the server refused a request: {error}") from error
            raise self._server.died(error.__cause__ or error) from error
        return self._counters().since(before).result(requests, wall)

    def pause(self) -> None:
        """Halt the server's processes until `resume`."""
        self._server.pause()

    def resume(self) -> None:
        """Let the processes go on."""
        self._server.resume()

    def close(self) -> None:
        """Stop the server and every process it started; safe to call twice."""
        self._loop.close()
        self._server.close()

    def __enter__(self) -> ServedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _stream_all(
        self, prompts: Sequence[list[int]], params: Sequence[dict[str, Any]]
    ) -> list[RequestResult]:
        tasks = [
            asyncio.ensure_future(stream(self._client, self._server.name, ids, fields))
            for ids, fields in zip(prompts, params, strict=True)
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # one failed: the others must not run into the next call
                task.cancel()

    def _counters(self) -> Counters:
        from prometheus_client.parser import text_string_to_metric_families

        return Counters.read(text_string_to_metric_families(self._server.get("/metrics")))


async def stream(
    client: AsyncOpenAI, model: str, prompt: list[int], fields: dict[str, Any]
) -> RequestResult:
    """One streamed completion of one sequence, with the times at which its tokens arrived."""
    start = time.perf_counter()
    first = last = start
    tokens: list[int] = []
    text = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    chunks = await client.completions.create(
        model=model, prompt=prompt, stream=True, extra_body={"return_token_ids": True, **fields}
    )
    async for chunk in chunks:
        for choice in chunk.choices:
            # Fields of vLLM that the client's types do not know.
            arrived: list[int] = getattr(choice, "token_ids", None) or []
            if arrived:
                last = time.perf_counter()
                first = first if tokens else last
                tokens += arrived
            text += choice.text
            if choice.finish_reason:  # null in all chunks but the last, whatever the type says
                finish_reason = choice.finish_reason
            stop_reason = getattr(choice, "stop_reason", None) or stop_reason
    completion = Completion(tokens, finish_reason, stop_reason, text)
    return RequestResult([completion], first_token_s=first - start, decode_s=last - first)
