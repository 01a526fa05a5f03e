# SPDX-License-Identifier: Apache-2.0
"""A real ``vllm serve`` as a child: started, waited for, and stopped with all its processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_ext.cli import process_group
from vllm_ext.cli.engine_types import EngineConfig, EngineDiedError, EngineError

START_SECONDS = 900.0  # with compilation on a small machine it takes minutes
STOP_SECONDS = 40.0
SHOWN_LINES = 15
_POLL_SECONDS = 1.0


def serve_command(llm: Mapping[str, Any], port: int, name: str) -> list[str]:
    """The command line for keyword arguments of `vllm.LLM` and options of the server."""
    arguments = [
        f"--served-model-name={name}",
        f"--port={port}",
    ]
    for key, value in llm.items():
        option = key.replace("_", "-")
        if key == "model":
            continue
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        else:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            arguments.append(f"--{option}={text}")
    return [str(Path(sys.executable).with_name("vllm")), "serve", str(llm["model"]), *arguments]


class ServerProcess:
    """A context manager around one server.

    Args:
        config: what it is started with.
        name: of the model, in requests.
        port: None for a free one.
        start_seconds: how long it may take to be ready.
        on_wait: told the last line of the server's log every second until then.

    Raises:
        EngineError: It did not start; the message holds the end of its log.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        name: str = "model",
        port: int | None = None,
        start_seconds: float = START_SECONDS,
        on_wait: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.name = name
        chosen = port or free_port()
        self.url = f"http://127.0.0.1:{chosen}"
        handle, path = tempfile.mkstemp(prefix="vllm-ext-server-", suffix=".log")
        self.log = Path(path)
        self._failed = False
        command = serve_command(config.llm, chosen, name)
        with os.fdopen(handle, "wb") as log:
            # A group of its own: Ctrl-C reaches the parent only, which then stops it with its
            # workers. Not a session of its own: Linux shares cores out between sessions first
            # (sched_autogroup), and where the server's processes poll on every core a client in
            # another session has been seen to wait for seconds, unable to read or to hang up.
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **config.env},
                    process_group=0,
                )
            except OSError as error:
                self.log.unlink()
                raise EngineError(f"{command[0]} cannot be run ({error})") from error
        try:
            self._wait_until_ready(start_seconds, on_wait)
        except BaseException as error:
            self._failed = isinstance(error, EngineError)
            self.close()
            raise

    def get(self, path: str) -> str:
        """The text at `path` of the server.

        Raises:
            EngineError: The server refused it.
            EngineDiedError: It does not answer.
        """
        return self._open(urllib.request.Request(self.url + path))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON answer of `path` to the JSON `body`; raises as `get`."""
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        return json.loads(self._open(urllib.request.Request(self.url + path, data, headers)))

    def died(self, reason: object) -> EngineDiedError:
        """The error to raise when the server no longer answers; its log is kept."""
        self._failed = True
        return EngineDiedError(f"the server does not answer ({reason}){self._last_words()}")

    def pause(self) -> None:
        """Halt the server's processes until `resume`."""
        process_group.pause(self._process.pid)

    def resume(self) -> None:
        """Let the processes go on."""
        process_group.resume(self._process.pid)

    def close(self) -> None:
        """Stop the server and every process it started; safe to call twice."""
        if self._process.poll() is None:
            self.resume()
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        # The server leads a process group, so this takes along what it may have left behind.
        process_group.kill(self._process.pid)
        self._process.wait()
        if not self._failed:
            self.log.unlink(missing_ok=True)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_until_ready(self, seconds: float, on_wait: Callable[[str], None]) -> None:
        deadline = time.monotonic() + seconds
        while self._process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health"):
                return
            if time.monotonic() > deadline:
                raise EngineError(
                    f"the server was not ready after {seconds:g} seconds{self._last_words()}"
                )
            time.sleep(_POLL_SECONDS)
            on_wait(next(iter(self._last_lines(1)), ""))
        raise EngineError(f"the server ended with code {self._process.poll()}{self._last_words()}")

    def _open(self, request: urllib.request.Request) -> str:
        try:
            with urllib.request.urlopen(request) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            raise EngineError(f"{request.full_url}: {error}: {error.read().decode()}") from error
        except OSError as error:
            raise self.died(error) from error

    def _last_words(self) -> str:
        end = "\n".join(f"  {line}" for line in self._last_lines(SHOWN_LINES))
        return f"; the end of its log, {self.log}:\n{end}"

    def _last_lines(self, count: int) -> list[str]:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line for line in lines if line.strip()][-count:]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Make a terminated program unwind, so that it stops its servers; for the main thread."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
