# SPDX-License-Identifier: Apache-2.0
"""The package's samplers, run on a table of logits instead of an engine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from language import Language, Prefix
from numpy.typing import NDArray

from logits_processors.asap import Asap
from logits_processors.awrs import Awrs
from logits_processors.cars import Cars
from logits_processors.constraint import CompiledConstraint
from logits_processors.law import SamplingLaw
from logits_processors.masking import Masking
from logits_processors.population import (
    Continuation,
    Plan,
    Population,
    Request,
    drive,
    population,
)
from logits_processors.prefix_trie import PrefixTrie
from logits_processors.sampler import Sampler

DEAD = -1
"""Index of a text that could not be finished."""


@dataclass(frozen=True)
class Toy:
    """What all methods sample: a constraint, its enumerated language, the user's law."""

    compiled: CompiledConstraint
    language: Language
    law: SamplingLaw

    def ends(self, token: int) -> bool:
        """Tell whether ``token`` ends a text."""
        return token in self.compiled.vocabulary.eos_ids


@dataclass(frozen=True)
class Run:
    """Samples of one method, in the order in which they were drawn.

    Attributes:
        texts: ``int64[n]`` indices into the language's texts, or ``DEAD``.
        log_weights: ``float64[n]``.
        checks: token checks asked of the constraint, in all.
        masks: full masks asked of it.
        rows: rows of logits used, those of rejected attempts too.
        restarts: attempts that were given up.
    """

    texts: NDArray[np.int64]
    log_weights: NDArray[np.float64]
    checks: int
    masks: int
    rows: int
    restarts: int


@dataclass
class _Costs:
    checks: int = 0
    masks: int = 0
    rows: int = 0
    restarts: int = 0


def sampler_of(method: str, law: SamplingLaw, trie: PrefixTrie) -> Sampler[Any]:
    """Return a sampler; only ASAp and CARS use the trie."""
    if method == "masking":
        return Masking(law)
    if method == "awrs":
        return Awrs(law)
    return (Asap if method == "asap" else Cars)(law, trie)


def _attempt(
    toy: Toy,
    sampler: Sampler[Any],
    seed: int,
    costs: _Costs,
    prefix: Prefix = (),
    max_tokens: float = math.inf,
) -> tuple[Prefix, float, bool]:
    """Draw up to ``max_tokens`` more tokens; return them, their log weight, and if to try again."""
    constraint = toy.compiled.start()
    assert all(map(constraint.accept, prefix))
    state = sampler.start(constraint, seed)
    tokens: list[int] = []
    log_weight = 0.0
    while len(tokens) < max_tokens and not (tokens and toy.ends(tokens[-1])):
        draw = sampler.step(state, toy.language.rows[(*prefix, *tokens)])
        costs.rows += 1
        costs.checks += draw.checks
        costs.masks += draw.used_mask
        log_weight += draw.log_weight
        if draw.restart:
            assert isinstance(sampler, Cars)
            sampler.restart(state)
            costs.restarts += 1
            return (), log_weight, True
        if draw.token is None:
            break
        sampler.advance(state, draw.token)
        tokens.append(draw.token)
    return tuple(tokens), log_weight, False


def single(
    toy: Toy, sampler: Sampler[Any], seed: int, costs: _Costs | None = None
) -> tuple[Prefix, float, int]:
    """Draw a text; return its tokens, its log weight, and how many attempts it took."""
    for attempt in itertools.count():
        # As the engine does: an attempt is a request, and has a seed of its own.
        fresh = seed + (attempt << 32)
        tokens, log_weight, again = _attempt(toy, sampler, fresh, costs or _Costs())
        if not again:
            return tokens, log_weight, attempt + 1
    raise AssertionError("unreachable")


def populations(toy: Toy, count: int, seed: int, costs: _Costs | None = None) -> list[Population]:
    """Draw populations of 16, resampled token by token below half the ideal sample size."""
    longest = max(map(len, toy.language.texts))
    sampler, spent = Awrs(toy.law), costs or _Costs()

    def answer(request: Request) -> Continuation:
        tokens, log_weight, _ = _attempt(
            toy, sampler, request.seed, spent, request.tokens, request.max_tokens
        )
        return Continuation(tokens, log_weight, bool(tokens) and toy.ends(tokens[-1]), "")

    def submit(requests: list[Request]) -> list[Continuation]:
        return [answer(request) for request in requests]

    return [drive(population(Plan(16, 0.5, 1, longest, seed + i)), submit) for i in range(count)]


def _one_by_one(method: str, toy: Toy, count: int, seed: int) -> Run:
    sampler, costs = sampler_of(method, toy.law, PrefixTrie()), _Costs()
    drawn = [single(toy, sampler, seed + i, costs) for i in range(count)]
    return _run(toy, [(tokens, log_weight) for tokens, log_weight, _ in drawn], costs)


def _smc(toy: Toy, count: int, seed: int) -> Run:
    costs = _Costs()
    made = populations(toy, math.ceil(count / 16), seed, costs)
    drawn = [(p.tokens, p.log_weight) for one in made for p in one.particles]
    return _run(toy, drawn[:count], costs)


def _run(toy: Toy, drawn: Sequence[tuple[Prefix, float]], costs: _Costs) -> Run:
    index = {text: i for i, text in enumerate(toy.language.texts)}
    texts = np.array([index.get(tokens, DEAD) for tokens, _ in drawn])
    return Run(texts, np.array([log_weight for _, log_weight in drawn]), **vars(costs))


METHODS: dict[str, Callable[[Toy, int, int], Run]] = {
    **{name: partial(_one_by_one, name) for name in ("masking", "awrs", "asap", "cars")},
    "smc": _smc,
}
"""Draw ``count`` texts from a seed on: ``(toy, count, seed)``."""
