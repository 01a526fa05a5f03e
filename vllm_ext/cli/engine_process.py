# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine in a process of its own, driven over a pipe.

Each engine gets its own process because vLLM keeps state per process that an in-process A/B
comparison would mix up: the Prometheus registry (a second engine unregisters the first one's
counters), the environment (plain vLLM runs with this plugin off), and the plugin's wrappers.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_ext.cli import process_group
from vllm_ext.cli.engine_host import ENGINE_SHUTDOWN_SECONDS, serve
from vllm_ext.cli.engine_types import EngineConfig, EngineDiedError, GenerateResult

PROCESS_SHUTDOWN_SECONDS = 2 * ENGINE_SHUTDOWN_SECONDS


class EngineProcess:
    """A context manager around one engine; every call blocks until the engine has answered."""

    def __init__(self, config: EngineConfig, *, wait: bool = True) -> None:
        """Start the engine, and unless told otherwise wait until it is ready.

        Raises:
            EngineError: The engine did not start; the message holds vLLM's reason.
        """
        self._config = config
        self._start()
        if wait:
            self.wait()

    @property
    def log(self) -> Path:
        """Where the engine's own output goes; the file is kept if the engine failed."""
        return self._log

    def restart(self) -> None:
        """Stop the engine, crashed or not, and start it anew; raises as the constructor does."""
        self.close()
        self._start()
        self.wait()

    def wait(self) -> None:
        """Wait until the engine is ready; once, before anything is asked of it.

        Raises:
            EngineError: The engine did not start; the message holds vLLM's reason.
        """
        try:
            self._receive()
        except BaseException as error:
            self._failed = isinstance(error, Exception)  # not when the user ends the program
            self.close()
            raise

    def _start(self) -> None:
        handle, path = tempfile.mkstemp(prefix="vllm-ext-engine-", suffix=".log")
        os.close(handle)
        self._log = Path(path)
        self._failed = False
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=serve, args=(child, self._config, self._log))
        self._process.start()
        assert self._process.pid is not None
        self._pid = self._process.pid
        child.close()

    def encode(self, rows: Sequence[str | list[dict[str, Any]]], *, raw: bool) -> list[list[int]]:
        """Token ids of each row: a text, or the messages of a chat.

        With `raw`, a text is tokenized as it stands; otherwise it becomes one user message and
        goes through the model's chat template, as messages always do.
        """
        ids: list[list[int]] = self._call("encode", list(rows), raw)
        return ids

    def generate(
        self, prompts: Sequence[list[int]], params: Sequence[dict[str, Any]]
    ) -> GenerateResult:
        """Generate for all prompts in one batch.

        `params` holds one dict of `vllm.SamplingParams` arguments per prompt;
        "structured_outputs" in it may be a dict of `StructuredOutputsParams` arguments.

        Raises:
            EngineError: vLLM refused a request.
            EngineDiedError: The engine crashed, now or before.
        """
        result: GenerateResult = self._call("generate", list(prompts), list(params))
        return result

    def pause(self) -> None:
        """Halt the engine's processes until `resume`."""
        process_group.pause(self._pid)

    def resume(self) -> None:
        """Let the processes go on."""
        process_group.resume(self._pid)

    def close(self) -> None:
        """Stop the engine and every process it started; safe to call twice."""
        if self._pipe.closed:
            return
        self.resume()
        self._pipe.close()  # the child leaves its loop on end-of-file
        self._process.join(PROCESS_SHUTDOWN_SECONDS)
        # The child leads a process group, so this takes along what vLLM may have left behind.
        process_group.kill(self._pid)
        self._process.join()
        if not self._failed:
            self._log.unlink(missing_ok=True)

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, name: str, *args: Any) -> Any:
        try:
            self._pipe.send((name, args))
        except OSError as error:
            raise self._died(f"the engine process is gone ({error})") from error
        return self._receive()

    def _receive(self) -> Any:
        try:
            error, value = self._pipe.recv()
        except (EOFError, OSError) as failure:
            raise self._died("the engine process died") from failure
        if isinstance(error, EngineDiedError):
            raise self._died(str(error)) from error
        if error is not None:
            raise error
        return value

    def _died(self, reason: str) -> EngineDiedError:
        self._failed = True
        return EngineDiedError(f"{reason}; its log: {self._log}")
