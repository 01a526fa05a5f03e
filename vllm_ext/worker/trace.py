# SPDX-License-Identifier: Apache-2.0
"""When what ran, for looking at: Chrome's trace events, one per line.

Switched on by ``VLLM_EXT_TRACE=FILE``; ``chrome://tracing`` and Perfetto open the file, which is a
JSON array that is never closed, as their format allows.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

VARIABLE = "VLLM_EXT_TRACE"


class Trace:
    """Writes spans to the file that the environment names, or nothing.

    Args:
        path: of the file; ``None`` writes nothing.
    """

    def __init__(self, path: str | None) -> None:
        self._path = Path(path) if path else None
        self._lock = threading.Lock()
        if self._path is not None:
            self._path.write_text("[\n", encoding="utf-8")

    @classmethod
    def from_environment(cls) -> Trace:
        """As ``VLLM_EXT_TRACE`` says."""
        return cls(os.environ.get(VARIABLE))

    def span(self, name: str, begin: float, end: float, **details: int) -> None:
        """Something ran in this thread.

        Args:
            name: what.
            begin: seconds, of ``time.perf_counter``.
            end: likewise.
            details: shown with it.
        """
        if self._path is None:
            return
        event = {
            "name": name,
            "ph": "X",
            "ts": 1e6 * begin,
            "dur": 1e6 * (end - begin),
            "pid": os.getpid(),
            "tid": threading.get_native_id(),
            "args": details,
        }
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + ",\n")
