# SPDX-License-Identifier: Apache-2.0
"""Speaks as much of ``vllm serve`` as the benchmark uses: python stand_in_server.py PORT MODEL.

The model says how to behave: "missing" ends at once, "slow" is never ready. The server answers a
prompt of token ids with the same ids in pairs, [0] with a refusal, [1] by ending itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

METRICS = """# TYPE vllm:spec_decode_num_draft_tokens counter
vllm:spec_decode_num_draft_tokens_total{{engine="0"}} {0}
# TYPE vllm:spec_decode_num_accepted_tokens counter
vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {0}
# TYPE vllm_ext:drafting_seconds counter
vllm_ext:drafting_seconds_total {1}
# TYPE vllm_ext:steps counter
vllm_ext:steps_total {0}
# TYPE vllm:inter_token_latency_seconds histogram
vllm:inter_token_latency_seconds_bucket{{le="+Inf"}} {2}
vllm:inter_token_latency_seconds_count {2}
vllm:inter_token_latency_seconds_sum {2}
"""
served = 0
chunks = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        ready = sys.argv[2] != "slow"
        self.answer(200 if ready else 503, METRICS.format(served, served * 0.25, chunks))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            text = body.get("prompt") or json.dumps(body["messages"])
            self.answer(200, json.dumps({"tokens": list(map(ord, text))}))
        elif self.headers["Connection"] != "close":
            self.answer(500, json.dumps({"error": {"message": "I may be halted too long"}}))
        elif body["prompt"] == [0]:
            self.answer(400, json.dumps({"error": {"message": "no such prompt"}}))
        elif body["prompt"] == [1]:
            os._exit(3)
        else:
            self.stream(body)

    def stream(self, body: dict[str, Any]) -> None:
        global served, chunks
        self.answer(200, "", "text/event-stream")
        ids = body["prompt"]
        for start in range(0, len(ids), 2):
            time.sleep(0.05)
            chunks += 1
            last = start + 2 >= len(ids)
            choice = {
                "index": 0,
                "text": body["model"],
                "token_ids": ids[start : start + 2],
                "finish_reason": "length" if last else None,
            }
            chunk = {"id": "c", "object": "text_completion", "created": 0, "choices": [choice]}
            self.wfile.write(f"data: {json.dumps({**chunk, 'model': 'm'})}\n\n".encode())
        served += 1
        self.wfile.write(b"data: [DONE]\n\n")

    def answer(self, status: int, text: str, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())


if __name__ == "__main__":
    # A worker that ignores the polite signal, as a hanging engine does.
    ignore = f"import signal, time; signal.signal({int(signal.SIGTERM)}, signal.SIG_IGN)"
    worker = subprocess.Popen([sys.executable, "-c", f"{ignore}; time.sleep(600)"])
    print(f"FLAG={os.environ.get('FLAG')}", flush=True)
    print(f"worker {worker.pid}", flush=True)
    if sys.argv[2] == "missing":
        sys.exit("ValueError: no such model")
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
