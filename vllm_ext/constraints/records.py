# SPDX-License-Identifier: Apache-2.0
"""How records leave the worker: one more method on vLLM's workers, called by ``collective_rpc``.

The method is added to the base class by the plugin, in memory. vLLM's own door for this,
``worker_extension_cls``, takes one class and may be in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from logits_processors.session import Record

RPC = "vllm_ext_constraint_records"


def install() -> None:
    """Give vLLM's workers the method :data:`RPC`."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, RPC, _records)


def find_processor(worker: Any) -> Any | None:
    """Return our processor in a worker, whichever runner it has; ``None`` if there is none."""
    from logits_processors.vllm_v1 import V1Processor

    runner = worker.model_runner
    batch = getattr(runner, "input_batch", None)
    processors = list(getattr(getattr(batch, "logitsprocs", None), "all", ()))
    if not processors:
        from logits_processors.vllm_v2 import V2Processor

        processors = list(getattr(getattr(runner, "sampler", None), "logits_processors", ()))
        return next((p for p in processors if isinstance(p, V2Processor)), None)
    return next((p for p in processors if isinstance(p, V1Processor)), None)


def _records(worker: Any, names: Sequence[str]) -> list[dict[str, Any]]:
    processor = find_processor(worker)
    return [] if processor is None else list(processor.records(names))


def merge_replies(
    names: Sequence[str], replies: Sequence[Sequence[dict[str, Any]]]
) -> dict[str, list[Record]]:
    """Group the replies of all workers by name.

    The ranks of one engine hold the same records, the engines of a data-parallel group different
    ones: each name is taken from the first worker that knows it.
    """
    merged: dict[str, list[Record]] = {name: [] for name in names}
    for reply in replies:
        known = {name for name, records in merged.items() if records}
        for fields in reply:
            if fields["id"] not in known:
                merged[fields["id"]].append(Record(**fields))
    return merged
