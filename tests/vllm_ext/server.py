# SPDX-License-Identifier: Apache-2.0
"""The real ``vllm serve`` on the tiny model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import vllm

MAX_LEN = 2304
START_SECONDS = 240
MODEL = "tiny"
# Routes for tokens; vLLM 0.31 has no such switch.
SCALE_OUT = () if vllm.__version__.startswith("0.31") else ("--enable-scale-out",)


def serve_command(model: Path, speculative: dict[str, Any], *more: str) -> list[str]:
    vllm = Path(sys.executable).with_name("vllm")
    return [
        str(vllm),
        "serve",
        str(model),
        "--served-model-name",
        MODEL,
        "--speculative-config",
        json.dumps(speculative),
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        str(MAX_LEN),
        "--max-num-batched-tokens",
        "256",
        "--max-num-seqs",
        "16",
        # Few blocks, all in use soon: pages of the KV cache count only once they are touched.
        "--num-gpu-blocks-override",
        "64",
        *more,
    ]


@dataclass
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]
    folder: Path  # its log, and its cache

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return str(answer.read().decode())

    def complete(self, **body: Any) -> dict[str, Any]:
        data = json.dumps({"model": MODEL, "max_tokens": 24, "temperature": 0, **body}).encode()
        request = urllib.request.Request(
            self.url + "/v1/completions", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return dict(json.load(answer))

    def metric(self, name: str) -> float:
        lines = self.get("/metrics").splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name)]
        assert values, f"{name} is not among the server's metrics"
        return sum(values)

    def memory(self) -> int:
        tree = [psutil.Process(self.process.pid)]
        tree += tree[0].children(recursive=True)
        return sum(p.memory_full_info().uss for p in tree)


@contextmanager
def running_server(model: Path, folder: Path) -> Iterator[Server]:
    """Start a server with our method, and stop it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    speculative = {
        "method": "dyspec",
        "num_speculative_tokens": 8,
        "prime": "background",
        # A table that is full at once: while it fills, a quarter of a kilobyte for each new pair of
        # tokens (and random weights write new ones) would pass for a leak.
        "trigrams": 1024,
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            serve_command(
                model, speculative, "--host", "127.0.0.1", "--port", str(port), *SCALE_OUT
            ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_PLUGINS": "vllm_ext",  # routes of plugins need to be allowed by name
                "XDG_CACHE_HOME": str(folder),
                # oneDNN keeps a primitive for each new number of rows, hundreds of megabytes in
                # all, with or without us; they would hide a leak.
                "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
            },
            # A session of its own would starve us on a busy machine, see `ServerProcess`.
            process_group=0,
        )
    try:
        started = Server(f"http://127.0.0.1:{port}", process, folder)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                started.get("/health")
                break
            except (urllib.error.URLError, ConnectionError):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(
                        f"the server did not start:\n{log.read_text()[-3000:]}"
                    ) from None
                time.sleep(0.5)
        assert "vllm-ext: method dyspec" in log.read_text()
        # Done soon for so small a vocabulary; what follows shall find a quiet server.
        while "vllm-ext: primed with" not in log.read_text():
            assert time.monotonic() < deadline, f"not primed:\n{log.read_text()[-3000:]}"
            time.sleep(0.1)
        yield started
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
