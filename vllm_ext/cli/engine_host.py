# SPDX-License-Identifier: Apache-2.0
"""The child side of `EngineProcess`: holds the engine and answers calls over a pipe."""

from __future__ import annotations

import os
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_ext.cli.counters import Counters
from vllm_ext.cli.engine_types import (
    Completion,
    EngineConfig,
    EngineDiedError,
    EngineError,
    GenerateResult,
    RequestResult,
)

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from vllm import LLM, RequestOutput, SamplingParams

# vLLM kills its workers after 5 seconds by default, which leaks their shared memory when the
# machine is busy.
ENGINE_SHUTDOWN_SECONDS = 20.0


def serve(pipe: Connection, config: EngineConfig, log: Path) -> None:
    """Body of the child process: build the engine, then answer calls until the pipe closes."""
    # At the level of file descriptors, which vLLM's own processes and libraries inherit.
    with log.open("ab") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    # A group of its own: Ctrl-C reaches the parent only, which then closes every engine in order.
    os.setpgrp()
    os.environ.update(config.env)
    try:
        host = _EngineHost(config)
        pipe.send((None, None))
    except Exception as error:
        pipe.send((EngineError(f"{_message(error)}; the engine's log: {log}"), None))
        return
    while True:
        try:
            name, args = pipe.recv()
        except EOFError:
            break
        reply: tuple[EngineError | None, Any]
        try:
            reply = (None, getattr(host, name)(*args))
        except Exception as error:
            reply = (_portable(error), None)
        pipe.send(reply)
    host.shutdown()


def _portable(error: Exception) -> EngineError:
    """`error` and its cause as one message, in a class that the parent can unpickle."""
    from vllm.v1.engine.exceptions import EngineDeadError

    kind = EngineDiedError if isinstance(error, EngineDeadError) else EngineError
    return kind(_message(error))


def _message(error: Exception) -> str:
    text = "".join(traceback.format_exception_only(error)).strip()
    cause = error.__cause__ or error.__context__
    if cause is not None:
        text += " (caused by: " + "".join(traceback.format_exception_only(cause)).strip() + ")"
    return text


class _EngineHost:
    """Lives in the child process; its public methods are what the parent may call."""

    def __init__(self, config: EngineConfig) -> None:
        from vllm import LLM

        self._llm: LLM = LLM(**config.llm, disable_log_stats=False)

    def encode(self, rows: list[str | list[dict[str, Any]]], raw: bool) -> list[list[int]]:
        tokenizer: Any = self._llm.get_tokenizer()
        ids = []
        for row in rows:
            if isinstance(row, str) and raw:
                ids.append(list(tokenizer.encode(row)))
                continue
            messages = [{"role": "user", "content": row}] if isinstance(row, str) else row
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            ids.append(list(tokenizer.encode(text, add_special_tokens=False)))
        return ids

    def generate(self, prompts: list[list[int]], params: list[dict[str, Any]]) -> GenerateResult:
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        sampling = [_sampling_params(p) for p in params]
        before = _counters()
        start = time.perf_counter()
        outputs = self._llm.generate(inputs, sampling, use_tqdm=False)
        wall = time.perf_counter() - start
        return _counters().since(before).result([_request_result(o) for o in outputs], wall)

    def shutdown(self) -> None:
        self._llm.llm_engine.engine_core.shutdown(timeout=ENGINE_SHUTDOWN_SECONDS)


def _counters() -> Counters:
    """Counters since the engine started; `LLM.get_metrics` knows only those of vLLM's own name."""
    from prometheus_client import REGISTRY

    return Counters.read(REGISTRY.collect())


def _sampling_params(kwargs: dict[str, Any]) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    constraint = kwargs.get("structured_outputs")
    if constraint is not None:
        kwargs = kwargs | {"structured_outputs": StructuredOutputsParams(**constraint)}
    return SamplingParams(**kwargs)


def _request_result(output: RequestOutput) -> RequestResult:
    completions = [
        Completion(
            token_ids=list(c.token_ids),
            finish_reason=c.finish_reason,
            stop_reason=c.stop_reason,
            text=c.text,
            logprobs=_plain_logprobs(c.logprobs),
        )
        for c in output.outputs
    ]
    prompt_logprobs = _plain_logprobs(output.prompt_logprobs)
    m = output.metrics
    if m is None:
        return RequestResult(completions, prompt_logprobs=prompt_logprobs)
    return RequestResult(
        completions,
        first_token_s=float(m.first_token_latency),
        decode_s=max(0.0, float(m.last_token_ts - m.first_token_ts)),
        prompt_logprobs=prompt_logprobs,
    )


def _plain_logprobs(rows: Any) -> list[dict[int, float]] | None:
    if rows is None:
        return None
    return [{int(t): float(lp.logprob) for t, lp in (row or {}).items()} for row in rows]
