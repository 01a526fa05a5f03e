# SPDX-License-Identifier: Apache-2.0
"""The package's samplers, run on a table of logits instead of an engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from language import Language
from numpy.typing import NDArray

from logits_processors.asap import Asap
from logits_processors.awrs import Awrs
from logits_processors.cars import Cars
from logits_processors.constraint import CompiledConstraint
from logits_processors.law import SamplingLaw
from logits_processors.masking import Masking
from logits_processors.population import Continuation, Plan, Request, drive, population
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


def _generate(
    toy: Toy,
    sampler: Sampler[Any],
    seed: int,
    costs: _Costs,
    prefix: tuple[int, ...] = (),
    max_tokens: float = math.inf,
) -> tuple[tuple[int, ...], float, bool]:
    """Draw up to ``max_tokens`` more tokens; return them, their log weight, whether text ended."""
    constraint = toy.compiled.start()
    assert all(map(constraint.accept, prefix))
    state = sampler.start(constraint, seed)
    tokens: list[int] = []
    log_weight = 0.0
    while len(tokens) < max_tokens:
        draw = sampler.step(state, toy.language.rows[(*prefix, *tokens)])
        costs.rows += 1
        costs.checks += draw.checks
        costs.masks += draw.used_mask
        if draw.restart:
            assert isinstance(sampler, Cars)
            sampler.restart(state)
            tokens, log_weight = [], 0.0
            costs.restarts += 1
            continue
        log_weight += draw.log_weight
        if draw.token is None:
            break
        sampler.advance(state, draw.token)
        tokens.append(draw.token)
        if draw.token in toy.compiled.vocabulary.eos_ids:
            return tuple(tokens), log_weight, True
    return tuple(tokens), log_weight, False


def _one_by_one(toy: Toy, sampler: Sampler[Any], count: int, seed: int) -> Run:
    index = {text: i for i, text in enumerate(toy.language.texts)}
    costs = _Costs()
    drawn = [_generate(toy, sampler, seed + i, costs) for i in range(count)]
    texts = np.array([index.get(tokens, DEAD) for tokens, _, _ in drawn])
    weights = np.array([log_weight for _, log_weight, _ in drawn])
    return Run(texts, weights, **vars(costs))


def masking(toy: Toy, count: int, seed: int) -> Run:
    """Plain masking; its weights are the masses that it divided by."""
    return _one_by_one(toy, Masking(toy.law), count, seed)


def awrs(toy: Toy, count: int, seed: int) -> Run:
    """Adaptive weighted rejection sampling."""
    return _one_by_one(toy, Awrs(toy.law), count, seed)


def asap(toy: Toy, count: int, seed: int) -> Run:
    """ASAp from an empty trie."""
    return _one_by_one(toy, Asap(toy.law, PrefixTrie()), count, seed)


def cars(toy: Toy, count: int, seed: int) -> Run:
    """CARS from an empty trie."""
    return _one_by_one(toy, Cars(toy.law, PrefixTrie()), count, seed)


def smc(toy: Toy, count: int, seed: int) -> Run:
    """Populations of 16 with AWRS inside, resampled token by token below half the ideal ESS."""
    index = {text: i for i, text in enumerate(toy.language.texts)}
    longest = max(map(len, toy.language.texts))
    sampler, costs = Awrs(toy.law), _Costs()

    def answer(request: Request) -> Continuation:
        tokens, log_weight, ended = _generate(
            toy, sampler, request.seed, costs, request.tokens, request.max_tokens
        )
        return Continuation(tokens, log_weight, ended, "")

    texts: list[int] = []
    weights: list[float] = []
    while len(texts) < count:
        # Seeds of populations are spread apart by a hash, so counting up is enough.
        plan = Plan(16, 0.5, 1, longest, seed + len(texts))
        for particle in drive(population(plan), lambda r: [*map(answer, r)]).particles:
            texts.append(index.get(particle.tokens, DEAD))
            weights.append(particle.log_weight)
    return Run(np.array(texts[:count]), np.array(weights[:count]), **vars(costs))


METHODS: dict[str, Callable[[Toy, int, int], Run]] = {
    "masking": masking,
    "awrs": awrs,
    "asap": asap,
    "cars": cars,
    "smc": smc,
}
