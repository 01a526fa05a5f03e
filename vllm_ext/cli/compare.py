# SPDX-License-Identifier: Apache-2.0
"""Comparing two engines' answers, token by token.

In exact arithmetic a verified draft cannot change an answer. In floating point the two engines
compute the same logits in batches of different shape, so that where the two best tokens are closer
than rounding the choice may differ: a *tie*. Ties excuse a mismatch in float32 only, where they
are rare; in bfloat16 vLLM differs from itself, so rates are compared instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_ext.cli.engine_types import Completion, RequestResult

TIE_GAP = 1e-4
LOGPROB_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Mismatch:
    """The first place where one sequence differs from the reference.

    Attributes:
        sampling: Preset name.
        batch: Requests sent at once.
        prompt: Row of the prompt file, from 0.
        sequence: Which of the request's n sequences.
        position: Index of the first difference in the answer (in the prompt for
            "prompt_logprob"); the length of the shorter answer for "length" and "finish".
        reference_token: Token there, None past the end.
        token: The method's token there, None past the end.
        kind: "token", "length" (one answer is a prefix of the other), "finish" (the same tokens,
            another finish or stop reason, or another text), "count" (another number of
            sequences), "logprob" or "prompt_logprob".
        gap: Difference of the two largest logits of the reference there, for kind "token".
    """

    sampling: str
    batch: int
    prompt: int
    sequence: int
    position: int
    reference_token: int | None
    token: int | None
    kind: str
    gap: float | None = None

    def is_tie(self) -> bool:
        """Whether rounding explains it: a different choice between two equally good tokens."""
        return self.kind == "token" and self.gap is not None and self.gap < TIE_GAP

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types, with the verdict of `is_tie` as "tie"."""
        return {**asdict(self), "tie": self.is_tie()}


def compare(
    reference: RequestResult, other: RequestResult, *, sampling: str, batch: int, prompt: int
) -> list[Mismatch]:
    """First difference of each sequence of a request; empty if the answers are identical.

    Where both carry log-probabilities, those of the same token may differ by `LOGPROB_TOLERANCE`.
    """

    def mismatch(
        sequence: int, position: int, kind: str, tokens: tuple[int | None, int | None]
    ) -> Mismatch:
        return Mismatch(sampling, batch, prompt, sequence, position, *tokens, kind)

    if len(reference.completions) != len(other.completions):
        return [mismatch(0, 0, "count", (None, None))]
    found = []
    in_prompt = _first_logprob_difference(reference.prompt_logprobs, other.prompt_logprobs)
    if in_prompt is not None:
        found.append(mismatch(0, in_prompt, "prompt_logprob", (None, None)))
    for sequence, (a, b) in enumerate(zip(reference.completions, other.completions, strict=True)):
        difference = _first_difference(a, b)
        if difference is not None:
            position, kind = difference
            tokens = (_token_at(a.token_ids, position), _token_at(b.token_ids, position))
            found.append(mismatch(sequence, position, kind, tokens))
    return found


def _first_difference(a: Completion, b: Completion) -> tuple[int, str] | None:
    for position, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=False)):
        if x != y:
            return position, "token"
    shorter = min(len(a.token_ids), len(b.token_ids))
    if len(a.token_ids) != len(b.token_ids):
        return shorter, "length"
    if (a.finish_reason, a.stop_reason, a.text) != (b.finish_reason, b.stop_reason, b.text):
        return shorter, "finish"
    at = _first_logprob_difference(a.logprobs, b.logprobs)
    return None if at is None else (at, "logprob")


def _first_logprob_difference(
    a: list[dict[int, float]] | None, b: list[dict[int, float]] | None
) -> int | None:
    if a is None and b is None:
        return None
    if a is None or b is None or len(a) != len(b):
        return 0
    for position, (x, y) in enumerate(zip(a, b, strict=True)):
        # The last of the top tokens may tie with one that is not listed: compare what both list.
        common = x.keys() & y.keys()
        if bool(x or y) != bool(common) or any(
            abs(x[t] - y[t]) > LOGPROB_TOLERANCE for t in common
        ):
            return position
    return None


def _token_at(token_ids: Sequence[int], position: int) -> int | None:
    return token_ids[position] if position < len(token_ids) else None


def verdict(mismatches: Sequence[Mismatch], *, excuse_ties: bool) -> bool:
    """Whether the method passes: no mismatch, or only ties where those are excused."""
    return all(excuse_ties and m.is_tie() for m in mismatches)
