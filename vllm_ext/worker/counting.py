# SPDX-License-Identifier: Apache-2.0
"""Counters of what was drafted, accepted and decided; `metrics` makes them visible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_ext.request_options import node_cap
from vllm_ext.worker.drafting import Drafting
from vllm_ext.worker.metrics import Counters
from vllm_ext.worker.step import Step


class CountingMixin:
    """Goes before a V1 runner class in the bases of a subclass."""

    def _count_decisions(self: Any, drafting: Drafting, request_ids: Sequence[str]) -> None:
        """Update the counters of what was decided about drafting."""
        gate, counters = drafting.drafter.gate, self._counters
        if gate is not None:
            counters.add("paused_steps", float(not gate.is_open))
            counters.add("pauses", gate.switches - self._switches)
            self._switches = gate.switches
        extras = (self.requests[r].sampling_params.extra_args for r in request_ids)
        counters.add("capped_requests", sum(node_cap(extra) is not None for extra in extras))

    def _count(self: Any, tokens: Any, seconds: float) -> None:
        """Update the counters after one step."""
        step: Step = self._step
        emitted = [len(t) for t in tokens]
        counters: Counters = self._counters
        if not any(emitted):
            return
        sizes = [
            0 if step.plain else len(tree) for tree, e in zip(step.trees, emitted, strict=True) if e
        ]
        counters.add("steps", 1)
        counters.add("steps_without_draft", float(not any(sizes)))
        counters.add("request_steps", len(sizes))
        counters.add("drafted_nodes", sum(sizes))
        counters.add("branching_trees", len(step.attention.trees) if step.attention else 0)
        counters.add("drawn_trees", sum(rule is not None for rule in self._verifications))
        counters.add("accepted_tokens", sum(e - 1 for e in emitted if e))
        counters.add("emitted_tokens", sum(emitted))
        counters.add("drafting_seconds", seconds)
        counters.add("chain_fallbacks", step.strangers)
        counters.observe_trees(sizes)
