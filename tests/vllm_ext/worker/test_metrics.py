# SPDX-License-Identifier: Apache-2.0
"""Counters of several engines, on their way from worker processes to ``/metrics``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest, multiprocess

from vllm_ext.worker import metrics
from vllm_ext.worker.metrics import COUNTERS, Counters

WORKER = """
import sys
from vllm_ext.worker.metrics import Counters

shared, rounds = sys.argv[1] == "shared", int(sys.argv[2])
counters = Counters(shared=shared)
if "again" in sys.argv:
    counters = Counters(shared=shared)  # a second engine in one process
for _ in range(rounds):
    counters.add("steps", 1)
    counters.add("drafting_seconds", 0.5)
    counters.observe_trees([5])
assert counters.snapshot()["steps"] == rounds
"""
ROUNDS = 4000


def workers(*arguments: list[str], **environment: str) -> None:
    """Worker processes side by side."""
    running = [
        subprocess.Popen([sys.executable, "-c", WORKER, *a], env={**os.environ, **environment})
        for a in arguments
    ]
    assert [process.wait(timeout=120) for process in running] == [0] * len(running)


def shown(registry: CollectorRegistry) -> dict[str, float]:
    """Our samples as ``/metrics`` shows them."""
    lines = generate_latest(registry).decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line.startswith("vllm_ext:")]
    return {name: float(value) for name, value in pairs}


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a front end shows that has begun to share; its folder is in the environment."""
    made = CollectorRegistry()
    monkeypatch.setattr("prometheus_client.REGISTRY", made)
    monkeypatch.setattr(metrics, "_shared", False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setenv(metrics.FOLDER_VARIABLE, "set anew by the next line")
    metrics.share_with_workers()
    return made


def test_engines_side_by_side_lose_no_count(registry: CollectorRegistry) -> None:
    assert shown(registry)["vllm_ext:steps_total"] == 0
    workers(*[["shared", str(ROUNDS)]] * 3, ["other rank", str(ROUNDS)])
    found = shown(registry)
    assert found["vllm_ext:steps_total"] == 3 * ROUNDS
    assert found["vllm_ext:drafting_seconds_total"] == 1.5 * ROUNDS
    assert found["vllm_ext:tree_size_sum"] == 15 * ROUNDS
    assert found["vllm_ext:tree_size_count"] == 3 * ROUNDS
    assert found['vllm_ext:tree_size_bucket{le="4.0"}'] == 0
    assert found['vllm_ext:tree_size_bucket{le="8.0"}'] == 3 * ROUNDS
    assert {f"vllm_ext:{name}_total" for name, _ in COUNTERS} <= set(found)


def test_sharing_twice_shares_once(registry: CollectorRegistry) -> None:
    folder = os.environ[metrics.FOLDER_VARIABLE]
    metrics.share_with_workers()
    assert os.environ[metrics.FOLDER_VARIABLE] == folder


def test_a_file_that_is_being_made_is_left_out(registry: CollectorRegistry) -> None:
    (Path(os.environ[metrics.FOLDER_VARIABLE]) / "new").write_bytes(b"12345678")
    assert shown(registry)["vllm_ext:steps_total"] == 0


def test_without_a_folder_counters_are_private(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(metrics.FOLDER_VARIABLE, "/of/another/machine")
    counters = Counters(shared=True)
    counters.add("steps", 2)
    assert counters.snapshot()["steps"] == 2


def test_several_api_servers_collect_from_prometheus_own_files(tmp_path: Path) -> None:
    workers(
        ["shared", "30"],
        ["shared", "40", "again"],
        ["other rank", "50"],
        PROMETHEUS_MULTIPROC_DIR=str(tmp_path),
    )
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(tmp_path))
    found = shown(registry)
    assert found["vllm_ext:steps_total"] == 70
    assert found["vllm_ext:drafting_seconds_total"] == 35
    assert found["vllm_ext:tree_size_count"] == 70
    assert found["vllm_ext:tree_size_sum"] == 350
