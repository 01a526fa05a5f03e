# SPDX-License-Identifier: Apache-2.0
"""Speculation counters of an engine, from Prometheus metrics: its registry's or its server's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_ext.cli.engine_types import GenerateResult, RequestResult

_DRAFTED = "vllm:spec_decode_num_draft_tokens_total"
_ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
_DRAFTING = "vllm_ext:drafting_seconds_total"
_STEPS = "vllm_ext:steps_total"
_OUTPUTS = ("vllm:time_to_first_token_seconds_count", "vllm:inter_token_latency_seconds_count")
"""vLLM times every output of a request, which holds the tokens of one step: the first, the rest."""


@dataclass(frozen=True)
class Counters:
    """Totals since the engine started.

    `request_steps` are the steps that gave a request tokens, summed over requests. The last two are
    ours: None where this plugin is off.
    """

    draft_tokens: int = 0
    accepted_tokens: int = 0
    request_steps: int = 0
    drafting_s: float | None = None
    engine_steps: int | None = None

    @classmethod
    def read(cls, families: Iterable[Any]) -> Counters:
        """From metric families of `prometheus_client`, summed over labels."""
        totals: dict[str, float] = {}
        for family in families:
            for sample in family.samples:
                totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
        return cls(
            draft_tokens=int(totals.get(_DRAFTED, 0)),
            accepted_tokens=int(totals.get(_ACCEPTED, 0)),
            request_steps=int(sum(totals.get(name, 0) for name in _OUTPUTS)),
            drafting_s=totals.get(_DRAFTING),
            engine_steps=int(totals[_STEPS]) if _STEPS in totals else None,
        )

    def since(self, before: Counters) -> Counters:
        """What was counted between `before` and now.

        The drafting of a call's last step may be counted with the next call, as drafts are made
        after the tokens are out; over many calls it is a wash.
        """
        return Counters(
            self.draft_tokens - before.draft_tokens,
            self.accepted_tokens - before.accepted_tokens,
            self.request_steps - before.request_steps,
            None if self.drafting_s is None else self.drafting_s - (before.drafting_s or 0.0),
            None if self.engine_steps is None else self.engine_steps - (before.engine_steps or 0),
        )

    def result(self, requests: Sequence[RequestResult], wall_s: float) -> GenerateResult:
        """The result of a call during which this was counted."""
        return GenerateResult(
            requests=list(requests),
            wall_s=wall_s,
            draft_tokens=self.draft_tokens,
            accepted_tokens=self.accepted_tokens,
            request_steps=self.request_steps,
            drafting_s=self.drafting_s,
            engine_steps=self.engine_steps,
        )
