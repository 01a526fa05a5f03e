# SPDX-License-Identifier: Apache-2.0
"""Running a verification: answers of one engine after the other, then their differences.

Only one engine is alive at a time, so that a verification needs no more memory than serving. The
reference comes last: it is still alive when the logit gaps at the differences are asked for.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from vllm_ext.cli.bench_run import Engine
from vllm_ext.cli.compare import Mismatch, compare
from vllm_ext.cli.engine_types import EngineDiedError, EngineError, RequestResult
from vllm_ext.cli.presets import Preset
from vllm_ext.cli.prompts import EncodedPrompt

Cell = tuple[str, int]  # (preset name, batch size)


class RestartableEngine(Engine, Protocol):
    """The part of `EngineProcess` that a verification uses."""

    def restart(self) -> None:
        """Start anew after a crash."""


@dataclass
class Answers:
    """What one engine said: per cell the requests in prompt order, or why it refused them."""

    requests: dict[Cell, list[RequestResult]] = field(default_factory=dict)
    refused: dict[Cell, str] = field(default_factory=dict)
    draft_tokens: Counter[Cell] = field(default_factory=Counter)
    accepted_tokens: Counter[Cell] = field(default_factory=Counter)


@dataclass(frozen=True)
class CellReport:
    """The comparison of one cell; `refused` says why there was nothing to compare.

    `tokens` are the reference's; drafted and accepted tokens are the method's.
    """

    sampling: str
    batch: int
    requests: int
    tokens: int
    mismatches: list[Mismatch]
    draft_tokens: int = 0
    accepted_tokens: int = 0
    refused: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Counts as plain JSON types; the rate is differing requests per request."""
        different = len({m.prompt for m in self.mismatches})
        return {
            "sampling": self.sampling,
            "batch": self.batch,
            "requests": self.requests,
            "tokens": self.tokens,
            "different_requests": different,
            "rate": different / self.requests if self.requests else None,
            "ties": sum(m.is_tie() for m in self.mismatches),
            "draft_tokens": self.draft_tokens,
            "accepted_tokens": self.accepted_tokens,
            "refused": self.refused,
        }


def answer(
    engine: RestartableEngine,
    prompts: Sequence[EncodedPrompt],
    presets: Mapping[str, Preset],
    batches: Sequence[int],
    max_tokens: int,
    on_done: Callable[[int, str], None] = lambda count, sampling: None,
) -> Answers:
    """Ask one engine everything; `on_done` is told the requests answered and their preset.

    The largest batch size is the engine's limit of concurrent requests: there, all prompts are
    sent at once, so that requests join and leave a running batch. An engine that crashes is
    restarted for the next cell.
    """
    answers = Answers()
    for name, preset in presets.items():
        for batch in batches:
            step = len(prompts) if batch == max(batches) > 1 else batch
            requests: list[RequestResult] = []
            try:
                for group in (prompts[i : i + step] for i in range(0, len(prompts), step)):
                    result = engine.generate(
                        [p.token_ids for p in group],
                        [preset.params(p.index, max_tokens) for p in group],
                    )
                    requests += result.requests
                    answers.draft_tokens[name, batch] += result.draft_tokens
                    answers.accepted_tokens[name, batch] += result.accepted_tokens
                    on_done(len(group), name)
            except EngineError as error:
                answers.refused[name, batch] = str(error)
                if isinstance(error, EngineDiedError):
                    engine.restart()
            else:
                answers.requests[name, batch] = requests
    return answers


def report(
    reference: Answers,
    other: Answers,
    prompts: Sequence[EncodedPrompt],
    gap_at: Callable[[list[int]], float],
) -> list[CellReport]:
    """Compare every cell; `gap_at` gives the reference's top-2 logit gap after some token ids."""
    cells = [*reference.requests, *reference.refused]
    return [_report_cell(cell, reference, other, prompts, gap_at) for cell in cells]


def _report_cell(
    cell: Cell,
    reference: Answers,
    other: Answers,
    prompts: Sequence[EncodedPrompt],
    gap_at: Callable[[list[int]], float],
) -> CellReport:
    sampling, batch = cell
    for side, answers in (("reference", reference), ("method", other)):
        if cell in answers.refused:
            reason = f"{side}: {answers.refused[cell]}"
            return CellReport(sampling, batch, 0, 0, [], refused=reason)
    theirs, ours = reference.requests[cell], other.requests[cell]
    mismatches = [
        _with_gap(mismatch, prompt, expected, gap_at)
        for prompt, expected, got in zip(prompts, theirs, ours, strict=True)
        for mismatch in compare(expected, got, sampling=sampling, batch=batch, prompt=prompt.index)
    ]
    tokens = sum(request.num_tokens for request in theirs)
    return CellReport(
        sampling,
        batch,
        len(theirs),
        tokens,
        mismatches,
        other.draft_tokens[cell],
        other.accepted_tokens[cell],
    )


def _with_gap(
    mismatch: Mismatch,
    prompt: EncodedPrompt,
    expected: RequestResult,
    gap_at: Callable[[list[int]], float],
) -> Mismatch:
    if mismatch.kind != "token":
        return mismatch
    answer_ids = expected.completions[mismatch.sequence].token_ids[: mismatch.position]
    return dataclasses.replace(mismatch, gap=gap_at([*prompt.token_ids, *answer_ids]))


def top2_gap(engine: Engine, token_ids: list[int]) -> float:
    """Difference of the two largest logits of the token that follows `token_ids`."""
    params = {"max_tokens": 1, "temperature": 0.0, "logprobs": 2}
    result = engine.generate([token_ids], [params])
    rows = result.requests[0].completions[0].logprobs
    if not rows:
        raise EngineError("the reference returned no log-probabilities")
    best, second = sorted(rows[0].values(), reverse=True)[:2]
    return best - second
