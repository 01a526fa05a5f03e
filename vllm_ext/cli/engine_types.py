# SPDX-License-Identifier: Apache-2.0
"""What is said to an engine in a process of its own, and what comes back; all of it pickles."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class EngineError(RuntimeError):
    """The engine refused its configuration or a request; the message is its own."""


class EngineDiedError(EngineError):
    """The engine crashed: it answers nothing until it is restarted."""


@dataclass(frozen=True)
class Completion:
    """One finished sequence of one request."""

    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None
    text: str
    logprobs: list[dict[int, float]] | None = None
    """Per generated token: log-probability by token id, when the request asked for them."""


@dataclass(frozen=True)
class RequestResult:
    """All sequences of one request, and its latencies in seconds (0.0 where not recorded)."""

    completions: list[Completion]
    first_token_s: float = 0.0
    decode_s: float = 0.0
    """Time from the first to the last token."""
    prompt_logprobs: list[dict[int, float]] | None = None
    """Per prompt token (empty for the first), when the request asked for them."""

    @property
    def num_tokens(self) -> int:
        """Generated tokens over all sequences."""
        return sum(len(c.token_ids) for c in self.completions)


@dataclass(frozen=True)
class GenerateResult:
    """One call for a batch of requests: their answers, wall time and speculative counters.

    `accepted_tokens` may contain tokens beyond the end of an answer, which vLLM counts and drops;
    `request_steps` are the steps that gave a request tokens, summed over requests. `drafting_s` and
    `engine_steps` are this plugin's own counts: None where it is off.
    """

    requests: list[RequestResult]
    wall_s: float
    draft_tokens: int = 0
    accepted_tokens: int = 0
    request_steps: int = 0
    drafting_s: float | None = None
    engine_steps: int | None = None

    @property
    def num_tokens(self) -> int:
        """Generated tokens over all requests."""
        return sum(r.num_tokens for r in self.requests)


@dataclass(frozen=True)
class EngineConfig:
    """What one engine is started with.

    `llm` holds keyword arguments of `vllm.LLM`; `env` is added to the environment of the
    engine's process before vLLM is imported there.
    """

    llm: dict[str, Any]
    env: dict[str, str] = field(default_factory=dict)
