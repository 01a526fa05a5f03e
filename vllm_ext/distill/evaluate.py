# SPDX-License-Identifier: Apache-2.0
"""How much of a student's drafts the target would accept, on answers that the target wrote.

The student never writes here: as long as its draft is accepted, its context is the target's own
text, so one forward pass over an answer tells the fate of a draft at every place of it.

* *Greedy.* On greedy answers a drafted token is accepted when it is the target's best. Steps are
  replayed: a step accepts the agreeing tokens up to the first that differs, at most `CHAIN`.
* *T=1, ratio.* A token sampled from the student's q is accepted with probability
  sum_x min(p(x), q(x)) = 1 - TV(p, q) under the target's p (arXiv 2211.17192). Along an answer
  x ~ p, the chance that a chain is accepted through its j-th token is estimated without bias by
  prod_{i<j} min(1, q(x_i)/p(x_i)) * (1 - TV_j), for a path is drafted and accepted with probability
  prod min(p, q).
* *T=1, match.* The student's best token, accepted when the target draws it: p(argmax q). The mean
  accepted length of a chain is not estimated for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vllm_ext.distill.student import head_logits
from vllm_ext.distill.teacher import Answer, write

CHAIN = 4
_TOGETHER = 4
_RESAMPLES = 2000

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Text:
    """A prompt and the target's answer, as token ids."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Agreement:
    """Student against target at each token of one answer, float64 [tokens].

    Attributes:
        same: 1 where both have the same best token.
        overlap: 1 - TV, at T=1.
        ratio: min(1, q/p) of the answer's own token.
        matched: the target's probability of the student's best token.
        kl: full KL from target to student, in nats.
    """

    same: Floats
    overlap: Floats
    ratio: Floats
    matched: Floats
    kl: Floats


def answers(
    target: Any,
    prompts: Sequence[list[int]],
    ends: Sequence[int],
    most: int,
    seed: int,
    advance: Callable[[int], None],
) -> tuple[list[Text], list[Text]]:
    """What the target answers, greedy and at T=1, each in the order of the prompts.

    Prompts of similar length are answered together: the others' forced tokens cost a step each.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    pairs = {i: [Answer(prompts[i], ends, most, heat) for heat in (0.0, 1.0)] for i in order}
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, len(order), _TOGETHER):
        part = order[first : first + _TOGETHER]
        writers = [writer for i in part for writer in pairs[i]]
        write(target, writers, len(prompts[part[-1]]) + most, 1, generator)
        advance(len(part))
    greedy, sampled = (
        [Text(prompt, pairs[i][which].tokens) for i, prompt in enumerate(prompts)]
        for which in (0, 1)
    )
    return greedy, sampled


@torch.inference_mode()
def compare(target: Any, student: Any, texts: Sequence[Text]) -> list[Agreement]:
    """Both models on each text."""
    return [_compare(target, student, text) for text in texts]


def _compare(target: Any, student: Any, text: Text) -> Agreement:
    tokens = torch.tensor([text.prompt + text.answer])
    places = slice(len(text.prompt) - 1, -1)
    log_p = _log_probs(target, tokens)[places]
    log_q = _log_probs(student, tokens)[places]
    p, q = log_p.exp(), log_q.exp()
    drafted = log_q.argmax(-1, keepdim=True)
    said = torch.tensor(text.answer)[:, None].to(log_p.device)
    return Agreement(
        same=_floats(log_p.argmax(-1) == drafted[:, 0]),
        overlap=_floats(torch.minimum(p, q).sum(-1)),
        ratio=_floats((log_q - log_p).gather(1, said).exp().clamp(max=1)[:, 0]),
        matched=_floats(p.gather(1, drafted)[:, 0]),
        kl=_floats((p * (log_p - log_q)).sum(-1)),
    )


def summary(greedy: Sequence[Agreement], sampled: Sequence[Agreement]) -> dict[str, Any]:
    """Means over places with 95% bootstrap intervals over texts, as plain JSON types.

    Args:
        greedy: on the target's greedy answers.
        sampled: on its answers at T=1.
    """
    chains = [replayed(one.same) for one in greedy]
    return {
        "greedy": {
            "texts": len(greedy),
            "tokens": sum(len(one.same) for one in greedy),
            "top1_agreement": _mean([one.same for one in greedy]),
            "accepted_per_step": _mean(chains),
            "kl": _mean([one.kl for one in greedy]),
        },
        "t1": {
            "texts": len(sampled),
            "tokens": sum(len(one.same) for one in sampled),
            "one_minus_tv": _mean([one.overlap for one in sampled]),
            "accepted_per_step": _mean([expected(one.ratio, one.overlap) for one in sampled]),
            "matched": _mean([one.matched for one in sampled]),
            "kl": _mean([one.kl for one in sampled]),
        },
    }


def covered(texts: Sequence[Text], tokens: Sequence[int]) -> dict[str, Any]:
    """Share of the answers' tokens that are among `tokens`, with its interval."""
    kept = set(tokens)
    return _mean([np.array([t in kept for t in text.answer], np.float64) for text in texts])


def replayed(same: Floats) -> Floats:
    """Accepted tokens of each step of greedy decoding with a chain of `CHAIN` drafted tokens.

    A step whose chain would reach beyond the answer is left out: its draft is not judged.
    """
    steps = []
    place = 0
    while place + CHAIN <= len(same):
        wrong = np.flatnonzero(same[place : place + CHAIN] == 0)
        accepted = int(wrong[0]) if len(wrong) else CHAIN
        steps.append(accepted)
        place += accepted + 1
    return np.array(steps, np.float64)


def expected(ratio: Floats, overlap: Floats) -> Floats:
    """Expected accepted tokens of a sampled chain of `CHAIN` at each place that has room for it."""
    places = len(ratio) - CHAIN + 1
    if places < 1:
        return np.empty(0)
    reached = np.ones(places)
    total = np.zeros(places)
    for j in range(CHAIN):
        total += reached * overlap[j : j + places]
        reached = reached * ratio[j : j + places]
    return total


@torch.inference_mode()
def milliseconds(
    model: Any, tokens: Sequence[int] | None = None, context: int = 128, repeats: int = 15
) -> float:
    """Least time of a forward pass over one token after `context` others, to its logits.

    The least, since whatever else runs on the machine only adds to it.

    Args:
        model: the model.
        tokens: those whose logits are computed, if not all.
        context: tokens before it.
        repeats: how often it is timed.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    read = torch.zeros((1, context), dtype=torch.int64, device=model.device)
    model.model(read, past_key_values=cache)
    weight = model.get_output_embeddings().weight
    if tokens is not None:
        weight = weight[torch.tensor(tokens, device=weight.device)]
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        hidden = model.model(read[:, :1], past_key_values=cache).last_hidden_state
        nn.functional.linear(hidden, weight).argmax(-1).item()
        times.append(time.perf_counter() - begin)
    return 1e3 * min(times)


def _log_probs(model: Any, tokens: Tensor) -> Tensor:
    hidden = model.model(tokens.to(model.device), use_cache=False).last_hidden_state[0]
    return head_logits(model, hidden).log_softmax(-1)


def _floats(values: Tensor) -> Floats:
    return values.double().cpu().numpy()


def _mean(parts: Sequence[Floats]) -> dict[str, Any]:
    """Mean of all values, and its interval when whole texts are drawn anew."""
    sums = np.array([part.sum() for part in parts])
    counts = np.array([len(part) for part in parts], np.float64)
    if counts.sum() == 0:
        return {"mean": None, "low": None, "high": None}
    drawn = np.random.default_rng(0).integers(len(parts), size=(_RESAMPLES, len(parts)))
    totals = counts[drawn].sum(1)
    means = sums[drawn].sum(1)[totals > 0] / totals[totals > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "mean": float(sums.sum() / counts.sum()),
        "low": float(low),
        "high": float(high),
    }
