# SPDX-License-Identifier: Apache-2.0
"""The target writes and reads, and what it thinks of each next token is kept.

Sequences of one length, many at a time: a step of 32 rows costs a few plain ones. A row that is
*written* is a stream: a prompt, the target's own continuation of it, the next prompt, and so on, so
that no row waits for another and nothing is padded. Tokens of prompts are forced, the others drawn
from the target itself (on-policy data, arXiv 2306.13649 and 2310.08461), and every position is
labelled by the forward pass that the writing needs anyway.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vllm_ext.distill.filled_cache import filled_cache
from vllm_ext.distill.student import head_logits

# Of rows 0, 1, 2, 3, ...: users ask for greedy answers and for varied ones.
TEMPERATURES = (1.0, 0.0, 1.0, 0.7)
_HEAD_ROWS = 1024  # positions whose logits over the vocabulary are in memory at once


class Writer(Protocol):
    """Decides what stands at the next place of one row."""

    @property
    def temperature(self) -> float:
        """Of its draws; 0 is greedy."""
        ...

    def known(self) -> list[int]:
        """The tokens that it begins with, whatever the target says."""
        ...

    def next(self, drawn: int) -> int:
        """The next token, `drawn` by the target or another."""
        ...


class Stream:
    """Prompts one after another, each with an answer of at most `longest` tokens.

    Args:
        prompts: an endless supply.
        ends: tokens that end an answer; the first is put where one is cut off.
        longest: most tokens of an answer.
        temperature: of the draws.
    """

    def __init__(
        self, prompts: Iterator[list[int]], ends: Sequence[int], longest: int, temperature: float
    ) -> None:
        self._prompts = prompts
        self._ends = ends
        self._longest = longest
        self.temperature = temperature
        self._first = next(prompts)
        self._forced: deque[int] = deque()
        self._left = longest

    def known(self) -> list[int]:
        """The first prompt."""
        return self._first

    def next(self, drawn: int) -> int:
        """A forced token if one waits, else the drawn one."""
        if self._forced:
            return self._forced.popleft()
        self._left -= 1
        if drawn in self._ends:
            self._forced.extend(next(self._prompts))
            self._left = self._longest
        elif self._left == 0:
            self._forced.extend([self._ends[0], *next(self._prompts)])
            self._left = self._longest
        return drawn


class Answer:
    """One prompt and one answer; after its end, the end again.

    Args:
        prompt: at least one token.
        ends: tokens that end the answer.
        most: tokens of the answer.
        temperature: of the draws.
    """

    def __init__(
        self, prompt: list[int], ends: Sequence[int], most: int, temperature: float
    ) -> None:
        self._prompt = prompt
        self._ends = ends
        self._most = most
        self.temperature = temperature
        self.tokens: list[int] = []

    @property
    def done(self) -> bool:
        """Whether the answer is complete."""
        return len(self.tokens) == self._most or self.tokens[-1:] in [[end] for end in self._ends]

    def known(self) -> list[int]:
        """The prompt."""
        return self._prompt

    def next(self, drawn: int) -> int:
        """The drawn token while the answer is not done."""
        if self.done:
            return self._ends[0]
        self.tokens.append(drawn)
        return drawn


@dataclass(frozen=True)
class Labelled:
    """Sequences and what the target says after each of their tokens.

    Attributes:
        tokens: int32 [rows, length].
        ids: most likely next tokens, int32 [rows, length, k].
        probs: their probabilities, float16 [rows, length, k].
    """

    tokens: Tensor
    ids: Tensor
    probs: Tensor


@torch.inference_mode()
def write(
    target: Any,
    writers: Sequence[Writer],
    length: int,
    top_k: int,
    generator: torch.Generator,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Labelled:
    """Rows of `length` tokens that `writers` and the target agree on, labelled.

    Args:
        target: the model.
        writers: one per row.
        length: tokens of a row.
        top_k: how many tokens of a distribution are kept.
        generator: of the draws, on the CPU.
        advance: called with the number of new tokens.
    """
    device = target.device
    # A prompt may begin with more than a row takes.
    forced = [deque(writer.known()[:length]) for writer in writers]
    start = min(map(len, forced))
    tokens = torch.tensor(
        [[row.popleft() for _ in range(start)] for row in forced], dtype=torch.int64
    )
    heat = torch.tensor([writer.temperature for writer in writers], device=device)[:, None]
    cache = filled_cache(target.config, length)
    labelled: list[tuple[Tensor, Tensor]] = []
    read = tokens
    while True:
        hidden = target.model(read.to(device), past_key_values=cache).last_hidden_state
        labelled.append(labels(target, hidden, top_k))
        advance(read.numel())
        if tokens.shape[1] == length:
            break
        drawn = _draw(head_logits(target, hidden[:, -1]), heat, generator).tolist()
        chosen = [
            row.popleft() if row else writer.next(token)
            for row, writer, token in zip(forced, writers, drawn, strict=True)
        ]
        read = torch.tensor(chosen)[:, None]
        tokens = torch.cat([tokens, read], dim=1)
    return Labelled(
        tokens.to(torch.int32),
        torch.cat([ids for ids, _ in labelled], dim=1),
        torch.cat([probs for _, probs in labelled], dim=1),
    )


@torch.inference_mode()
def read(
    target: Any,
    tokens: Tensor,
    top_k: int,
    rows: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Labelled:
    """Label sequences that are there already, `rows` at a time.

    Args:
        target: the model.
        tokens: int64 [rows, length].
        top_k: how many tokens of a distribution are kept.
        rows: how many are read at once.
        advance: called with the number of labelled tokens.
    """
    labelled = []
    for part in torch.split(tokens, rows):
        hidden = target.model(part.to(target.device), use_cache=False).last_hidden_state
        labelled.append(labels(target, hidden, top_k))
        advance(part.numel())
    return Labelled(
        tokens.to(torch.int32),
        torch.cat([ids for ids, _ in labelled]),
        torch.cat([probs for _, probs in labelled]),
    )


def labels(target: Any, hidden: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """What the target says at final hidden states [..., D]: `Labelled`'s ids and probs [..., k]."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    ids, probs = [], []
    for part in torch.split(flat, _HEAD_ROWS):
        logits = head_logits(target, part)
        best = logits.topk(min(top_k, logits.shape[-1]))
        norm = logits.logsumexp(-1, keepdim=True)
        ids.append(best.indices.to(torch.int32).cpu())
        probs.append((best.values - norm).exp().to(torch.float16).cpu())
    shape = (*hidden.shape[:-1], -1)
    return torch.cat(ids).reshape(shape), torch.cat(probs).reshape(shape)


def _draw(logits: Tensor, heat: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row: the best where `heat` is 0, else by inverting the distribution function.

    One random number per row instead of one per token, which would cost as much as a layer.
    """
    best = logits.argmax(-1, keepdim=True)
    total = (logits / heat.clamp(min=1e-3)).softmax(-1).cumsum(-1)
    point = torch.rand(len(logits), 1, generator=generator).to(logits.device) * total[:, -1:]
    drawn = torch.searchsorted(total, point, right=True).clamp(max=logits.shape[-1] - 1)
    return torch.where(heat > 0, drawn, best)[:, 0]
