# SPDX-License-Identifier: Apache-2.0
"""A population of constrained texts, run round by round on any engine (SMC, arXiv 2504.13139).

Each round asks the engine to continue every unfinished particle by a few tokens under a constraint
with proper weights, multiplies these in, and resamples when few particles carry the weight. The
prefixes of the survivors are in the engine's prefix cache, so asking again costs little.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .race import uniforms
from .smc import Particles, normalized


@dataclass(frozen=True)
class Plan:
    """How a population is run.

    Args:
        particles: texts drawn side by side, N.
        ess: resample when the effective sample size falls below this share of N; 0 never.
        tokens_per_round: tokens that a particle grows by between two looks at the weights.
        max_tokens: longest text in tokens, its end included; a longer one has weight 0.
        seed: the same seed gives the same texts and weights.

    Raises:
        ValueError: an argument out of range.
    """

    particles: int = 16
    ess: float = 0.5
    tokens_per_round: int = 8
    max_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        Particles(self.particles, self.ess)
        for name in ("tokens_per_round", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1 is allowed")


@dataclass(frozen=True)
class Request:
    """What an engine is asked for: more of one particle's text.

    Attributes:
        tokens: the particle's text so far, to be appended to the prompt.
        seed: of the particle's noise, which must also depend on the position in the text.
        max_tokens: how many tokens to add at most.
    """

    tokens: tuple[int, ...]
    seed: int
    max_tokens: int


@dataclass(frozen=True)
class Continuation:
    """What an engine answers to a :class:`Request`.

    Attributes:
        tokens: the added tokens.
        log_weight: log of their proper weight; ``-inf`` where nothing allowed could follow.
        complete: whether the text has ended as the constraint wants it.
        text: the particle's whole text; only a potential looks at unfinished ones.
        checks: token checks that the constraint was asked for.
        mask_fallbacks: steps that used a full mask.
    """

    tokens: tuple[int, ...]
    log_weight: float
    complete: bool
    text: str
    checks: int = 0
    mask_fallbacks: int = 0


@dataclass(frozen=True)
class Particle:
    """A text of a population.

    Attributes:
        tokens: as emitted, end-of-text token included.
        text: what they spell.
        log_weight: for every function ``f`` the mean of ``exp(log_weight) f(text)`` over the
            population is an unbiased estimate of ``E[f 1{constraint} exp(potential)]`` under the
            model; ``-inf`` unless ``complete``.
        complete: whether the text satisfies the constraint.
    """

    tokens: tuple[int, ...]
    text: str
    log_weight: float
    complete: bool


@dataclass(frozen=True)
class Population:
    """The outcome of a run.

    Attributes:
        particles: N texts.
        log_evidence: log of an unbiased estimate of ``Pr(constraint)``, of
            ``E[1{constraint} exp(potential)]`` with a potential; ``-inf`` when all particles died.
        ess: effective sample size of the final weights.
        rounds: how often the engine was called.
        resamplings: how often the population was resampled.
        checks: token checks of all particles.
        mask_fallbacks: steps of all particles that used a full mask.
    """

    particles: tuple[Particle, ...]
    log_evidence: float
    ess: float
    rounds: int
    resamplings: int
    checks: int
    mask_fallbacks: int

    def posterior(self) -> dict[str, float]:
        """Return the estimated probability of each text given the constraint, largest first.

        Empty when every particle died. A ratio of estimates: consistent in N, not unbiased.
        """
        log_weights = np.array([particle.log_weight for particle in self.particles])
        shares: dict[str, float] = {}
        for particle, weight in zip(self.particles, normalized(log_weights), strict=True):
            if weight > 0.0:
                shares[particle.text] = shares.get(particle.text, 0.0) + float(weight)
        return dict(sorted(shares.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class _Member:
    """A particle while it grows; immutable, so that copies may share it."""

    seed: int
    tokens: tuple[int, ...] = ()
    text: str = ""
    score: float = 0.0
    complete: bool = False

    def grown(self, answer: Continuation, score: float) -> _Member:
        tokens = self.tokens + answer.tokens
        return _Member(self.seed, tokens, answer.text, score, answer.complete)


def _seed(seed: int, generation: int, index: int) -> int:
    """Return a seed of 53 bits, which survive any reader of JSON."""
    sequence = np.random.SeedSequence([seed & 0xFFFFFFFFFFFFFFFF, generation, index])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(11))


def _score(potential: Callable[[str], float], text: str) -> float:
    score = float(potential(text))
    if math.isnan(score) or score == math.inf:
        raise ValueError(
            f"potential({text!r}) is {score}: a log score is finite, or -inf for a text that no "
            "continuation can save"
        )
    return score


def population(
    plan: Plan, potential: Callable[[str], float] | None = None
) -> Generator[list[Request], Sequence[Continuation], Population]:
    """Run a population; whoever iterates sends the continuations of the yielded requests.

    The driver of an engine, waiting or not, is thereby a loop of a few lines. Only particles that
    are neither complete nor dead are asked for. A particle keeps its seed until the population is
    resampled; then all get new ones, or copies would stay copies.

    A potential is telescoped: each round multiplies in the ratio of its new and old value, so that
    the final weight holds ``exp(potential(text))`` whatever the rounds.

    Args:
        plan: see there.
        potential: log score of a text, of unfinished ones too; ``-inf`` must be final.

    Raises:
        ValueError: a potential of NaN or ``+inf``.
        RuntimeError: the engine stopped a text early, or did not answer each request.
    """
    weights = Particles(plan.particles, plan.ess)
    members = [_Member(_seed(plan.seed, 0, i)) for i in range(plan.particles)]
    rounds = resamplings = checks = mask_fallbacks = 0
    while running := _running(members, weights.log_weights):
        if rounds:
            ancestors = weights.resample(float(uniforms(plan.seed, rounds, 1)[0]))
            if ancestors is not None:
                resamplings += 1
                members = [
                    replace(members[ancestor], seed=_seed(plan.seed, resamplings, i))
                    for i, ancestor in enumerate(ancestors)
                ]
                running = _running(members, weights.log_weights)
                if not running:  # only finished texts survived
                    break
        requests = [
            Request(
                members[i].tokens,
                members[i].seed,
                min(plan.tokens_per_round, plan.max_tokens - len(members[i].tokens)),
            )
            for i in running
        ]
        answers = yield requests
        if len(answers) != len(requests):
            raise RuntimeError(f"{len(answers)} continuations for {len(requests)} requests")
        rounds += 1
        increments = np.zeros(plan.particles)
        for i, request, answer in zip(running, requests, answers, strict=True):
            checks += answer.checks
            mask_fallbacks += answer.mask_fallbacks
            increments[i] = answer.log_weight
            score = members[i].score
            if potential is not None and answer.log_weight > -math.inf:
                score = _score(potential, answer.text)
                increments[i] += score - members[i].score
            members[i] = members[i].grown(answer, score)
            if answer.complete or increments[i] == -math.inf:
                continue
            if len(answer.tokens) != request.max_tokens:
                raise RuntimeError(
                    f"the engine stopped a text after {len(answer.tokens)} of {request.max_tokens} "
                    "tokens though it is not complete; prompt and max_tokens must fit the model's "
                    "length, and stop strings cannot be used"
                )
            if len(members[i].tokens) == plan.max_tokens:
                increments[i] = -math.inf
        weights.reweight(increments)
    particles = tuple(
        Particle(member.tokens, member.text, float(log_weight), member.complete)
        for member, log_weight in zip(members, weights.absolute_log_weights, strict=True)
    )
    return Population(
        particles,
        weights.log_evidence,
        weights.ess,
        rounds,
        resamplings,
        checks,
        mask_fallbacks,
    )


def _running(members: Sequence[_Member], log_weights: NDArray[np.float64]) -> list[int]:
    return [i for i, m in enumerate(members) if not m.complete and log_weights[i] > -np.inf]


def drive(
    run: Generator[list[Request], Sequence[Continuation], Population],
    submit: Callable[[list[Request]], Sequence[Continuation]],
) -> Population:
    """Run a population on an engine that answers at once."""
    try:
        requests = next(run)
        while True:
            requests = run.send(submit(requests))
    except StopIteration as end:
        result: Population = end.value
        return result


async def drive_async(
    run: Generator[list[Request], Sequence[Continuation], Population],
    submit: Callable[[list[Request]], Awaitable[Sequence[Continuation]]],
) -> Population:
    """Run a population on an engine that is waited for."""
    try:
        requests = next(run)
        while True:
            requests = run.send(await submit(requests))
    except StopIteration as end:
        result: Population = end.value
        return result
