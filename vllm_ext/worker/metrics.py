# SPDX-License-Identifier: Apache-2.0
"""Counters of the workers, shown by the server's ``/metrics``.

vLLM's own counters travel with the scheduler's statistics, which have no room for ours.  The worker
that speaks for an engine therefore keeps its counters in a small memory-mapped file of its own, in
a folder that the front end made and named in the environment, and a collector in the front end adds
the files up whenever ``/metrics`` is asked: with data parallelism the numbers are those of all
engines on this machine.  In the multiprocess mode (several API servers) the workers'
``prometheus_client`` counters are collected by vLLM.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FOLDER_VARIABLE = "VLLM_EXT_METRICS_FOLDER"
_PREFIX = "vllm_ext:"

COUNTERS: tuple[tuple[str, str], ...] = (
    ("steps", "engine steps that sampled at least one token"),
    ("steps_without_draft", "of these, steps that verified no draft"),
    ("request_steps", "requests summed over steps"),
    ("drafted_nodes", "tree nodes verified"),
    ("branching_trees", "trees verified that had branches"),
    ("drawn_trees", "trees verified that were drawn from a draft model, by a rule of `verify`"),
    ("accepted_tokens", "tree nodes accepted"),
    ("emitted_tokens", "tokens emitted, the walk's own included"),
    ("drafting_seconds", "seconds spent on learning from a step and drafting the next"),
    ("paused_steps", "steps after which nothing was drafted, because lately it has not paid"),
    ("pauses", "how often drafting was paused or taken up again"),
    ("capped_requests", "requests, summed over steps, that limited or refused drafts themselves"),
    ("drafting_errors", "steps whose drafting failed and was given up; see the log"),
    ("beside_steps", "steps beside which a draft model ran (PEARL)"),
    ("beside_passes", "passes of the draft model beside steps"),
    ("beside_requests", "requests drafted beside steps, summed over steps"),
    ("beside_hits", "of these, requests whose step confirmed all that was drafted from"),
    ("chain_fallbacks", "scheduled drafts that were not a prefix of a proposed tree"),
)
"""Name and meaning of each counter, in the order of the file."""

TREE_SIZE_BUCKETS = (0, 1, 2, 4, 8, 16, 32, 64, 127)
_shared = False
_NAMES = [name for name, _ in COUNTERS]
_PLACES = {name: place for place, name in enumerate(_NAMES)}
_SLOTS = len(COUNTERS) + len(TREE_SIZE_BUCKETS) + 1  # the last slot sums the tree sizes


class Counters:
    """The worker's side: float64 slots, in a file of the shared folder if there is one.

    Args:
        shared: whether this process speaks for its engine (one rank of a tensor-parallel group
            does).
    """

    def __init__(self, *, shared: bool) -> None:
        folder = os.environ.get(FOLDER_VARIABLE)
        values: Any = np.zeros(_SLOTS)
        if shared and folder and os.path.isdir(folder):  # a worker of another machine has none
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                values.tofile(file)
            values = np.memmap(file.name, dtype=np.float64, mode="r+", shape=(_SLOTS,))
        self._values: Any = memoryview(values)  # whose items cost a tenth of an array's
        self._prometheus = _multiprocess_counters() if shared else None

    def add(self, name: str, amount: float) -> None:
        """Add ``amount`` to the counter ``name``."""
        if amount:
            self._values[_PLACES[name]] += amount
            if self._prometheus is not None:
                self._prometheus[name].inc(amount)

    def observe_trees(self, sizes: Sequence[int]) -> None:
        """Count trees of so many nodes each (0: a request step without a draft)."""
        for nodes, times in Counter(sizes).items():
            bucket = min(bisect_left(TREE_SIZE_BUCKETS, nodes), len(TREE_SIZE_BUCKETS) - 1)
            self._values[len(COUNTERS) + bucket] += times
            self._values[_SLOTS - 1] += nodes * times
        if self._prometheus is not None:
            for nodes in sizes:
                self._prometheus["tree_size"].observe(nodes)

    def snapshot(self) -> dict[str, float]:
        """All counters by name, plain floats."""
        return {name: float(value) for name, value in zip(_NAMES, self._values, strict=False)}


@functools.cache
def _multiprocess_counters() -> dict[str, Any] | None:
    """``prometheus_client`` counters, if they are shared between processes; one set per process,
    because names cannot be registered twice.
    """
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return None
    import prometheus_client as prometheus

    found: dict[str, Any] = {
        name: prometheus.Counter(_PREFIX + name, doc) for name, doc in COUNTERS
    }
    found["tree_size"] = prometheus.Histogram(
        _PREFIX + "tree_size", "nodes per request step", buckets=TREE_SIZE_BUCKETS
    )
    return found


class _FolderCollector:
    """Prometheus collector that adds up the workers' files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Any]:
        """Yield the current value of every counter."""
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        values = np.zeros(_SLOTS)
        for file in self._folder.iterdir():
            found = np.fromfile(file, dtype=np.float64)
            if len(found) == _SLOTS:  # else its worker is about to fill it
                values += found
        for (name, doc), value in zip(COUNTERS, values, strict=False):
            yield CounterMetricFamily(_PREFIX + name, doc, value=float(value))
        counts = np.cumsum(values[len(COUNTERS) : _SLOTS - 1])
        buckets = [
            (str(float(edge)), float(count))
            for edge, count in zip(TREE_SIZE_BUCKETS, counts, strict=True)
        ]
        yield HistogramMetricFamily(
            _PREFIX + "tree_size",
            "nodes per request step",
            buckets=[*buckets, ("+Inf", float(counts[-1]))],
            sum_value=float(values[_SLOTS - 1]),
        )


def share_with_workers() -> None:
    """Front end: make the folder, name it to the processes to come, and collect from it."""
    global _shared
    if _shared:  # all engines of one process are counted together
        return
    _shared = True
    from prometheus_client import REGISTRY

    folder = tempfile.mkdtemp(prefix="vllm-ext-metrics-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[FOLDER_VARIABLE] = folder
    REGISTRY.register(_FolderCollector(Path(folder)))
