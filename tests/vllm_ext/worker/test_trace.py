# SPDX-License-Identifier: Apache-2.0
"""Trace events."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from vllm_ext.worker.trace import VARIABLE, Trace


def test_spans_of_all_threads_are_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "trace.json"))
    trace = Trace.from_environment()
    trace.span("target", 1.0, 1.5, rows=3)
    thread = threading.Thread(target=trace.span, args=("draft", 1.1, 1.2))
    thread.start()
    thread.join()
    text = (tmp_path / "trace.json").read_text()
    target, draft = json.loads(text.rstrip().rstrip(",") + "]")
    assert (target["name"], target["ts"], target["dur"]) == ("target", 1e6, 5e5)
    assert target["args"] == {"rows": 3}
    assert draft["name"] == "draft"
    assert draft["dur"] == pytest.approx(1e5)
    assert target["tid"] != draft["tid"]


def test_nothing_is_written_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    Trace.from_environment().span("target", 0.0, 1.0)
    assert list(tmp_path.iterdir()) == []
