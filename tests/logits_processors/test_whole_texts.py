# SPDX-License-Identifier: Apache-2.0
"""E[w f(text)] is E[f(text) 1{constraint}] for random functions, languages and models, exactly.

Everything random is enumerated: the orders in which a race of tokens can come in, and where the one
random number of a resampling can fall. The samplers and the population are the package's own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product
from typing import Any, TypeAlias, TypeVar

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from toy_model import EOS, TINY, ToyModel, orders, spell, times_of

from logits_processors import awrs, masking
from logits_processors import population as population_module
from logits_processors.awrs import Awrs
from logits_processors.law import SamplingLaw
from logits_processors.masking import Masking
from logits_processors.population import Continuation, Plan, Request, drive, population
from logits_processors.sampler import Sampler
from logits_processors.smc import Particles, normalized
from logits_processors.text_constraint import CompiledTextConstraint

Result = TypeVar("Result")
Choose: TypeAlias = Callable[[Sequence[tuple[Any, float]]], Any]
Weigh: TypeAlias = Callable[[float], float]

CONTROL = settings(
    max_examples=200,
    deadline=None,
    database=None,
    report_multiple_bugs=False,
    phases=[Phase.generate],  # any example that fails will do
)


@dataclass(frozen=True)
class Words:
    """A finite language; beginnings of ``doomed`` are allowed too and lead into dead ends."""

    words: tuple[str, ...]
    doomed: tuple[str, ...]

    def viable(self, text: str) -> bool:
        return any(word.startswith(text) for word in self.words + self.doomed)

    def member(self, text: str) -> bool:
        return text in self.words


@dataclass(frozen=True)
class Case:
    """A model, a law, a language, and a function and a potential by word."""

    model: ToyModel
    law: SamplingLaw
    language: Words
    f: dict[str, float]
    potential: dict[str, float]

    def truth(self, f: dict[str, float]) -> float:
        """E[f(text) 1{constraint}] under the model, word by word."""
        mass = {w: math.exp(self.model.log_prob(spell(w), self.law)) for w in self.language.words}
        return math.fsum(mass[word] * f[word] for word in mass)


@st.composite
def cases(draw: Any, longest: int = 3) -> Case:
    text = st.text("012", max_size=longest)
    words = draw(st.lists(text, unique=True, min_size=1, max_size=5))
    doomed = draw(st.lists(text, max_size=2))
    law = SamplingLaw(draw(st.sampled_from([0.7, 1.0, 1.6])), draw(st.sampled_from([0, 3])), 1.0)
    numbers = st.lists(st.floats(-3, 3), min_size=len(words), max_size=len(words))
    f, potential = (dict(zip(words, draw(numbers), strict=True)) for _ in range(2))
    language = Words(tuple(words), tuple(doomed))
    return Case(ToyModel(draw(st.integers(0, 10**6))), law, language, f, potential)


def every(run: Callable[[Choose], Result]) -> Iterator[tuple[Result, float]]:
    """Yield what ``run`` returns for every sequence of choices, with its probability."""
    path: list[int] = []
    while True:
        sizes: list[int] = []
        chances: list[float] = []

        def choose(options: Sequence[tuple[Any, float]], sizes=sizes, chances=chances) -> Any:  # type: ignore[no-untyped-def]
            if len(path) == len(sizes):
                path.append(0)
            value, chance = options[path[len(sizes)]]
            sizes.append(len(options))
            chances.append(chance)
            return value

        yield run(choose), math.prod(chances)
        while path and path[-1] + 1 == sizes[len(path) - 1]:
            path.pop()
        if not path:
            return
        path[-1] += 1


class Steps:
    """The law of each step of a sampler: its tokens and log weights, with their probabilities."""

    def __init__(self, case: Case, sampler: Sampler[Any], races: int) -> None:
        compiled = CompiledTextConstraint(case.language, TINY, "words")

        @cache
        def after(prefix: tuple[int, ...]) -> list[tuple[tuple[int | None, float], float]]:
            state = sampler.start(compiled.start(), 0)
            assert all(sampler.advance(state, token) for token in prefix)
            logits = case.model.logits(prefix)
            p = np.exp(case.law.log_probs(logits))
            outcomes: dict[tuple[int | None, float], float] = {}
            queue: list[Any] = []

            def arrival_times(row: Any, _: Any) -> Any:
                return np.where(np.isneginf(row), np.inf, queue.pop(0))

            with pytest.MonkeyPatch.context() as patch:
                for module in (awrs, masking):
                    patch.setattr(module, "arrival_times", arrival_times)
                for race in product(list(orders(p)), repeat=races):
                    queue[:] = [times_of(order, p.size) for order, _ in race]
                    draw = sampler.step(state, logits)
                    outcome = (draw.token, round(draw.log_weight, 12))
                    chance = math.prod(chance for _, chance in race)
                    outcomes[outcome] = outcomes.get(outcome, 0.0) + chance
            return list(outcomes.items())

        self.after = after


def weight(log_weight: float) -> float:
    return math.exp(log_weight)


def one(log_weight: float) -> float:
    return 1.0 if log_weight > -math.inf else 0.0


def check_text(case: Case, sampler: Sampler[Any], weigh: Weigh = weight, races: int = 1) -> None:
    """Assert that single texts are unbiased."""
    steps = Steps(case, sampler, races)

    def text(choose: Choose) -> tuple[tuple[int, ...], float]:
        tokens: tuple[int, ...] = ()
        log_weight = 0.0
        while not tokens or tokens[-1] != EOS:
            token, step = choose(steps.after(tokens))
            log_weight += step
            if token is None:
                break
            tokens = (*tokens, token)
        return tokens, log_weight

    f = {spell(word): value for word, value in case.f.items()}
    found = list(every(text))
    assert math.fsum(chance for _, chance in found) == pytest.approx(1.0)
    mean = math.fsum(weigh(w) * f.get(tokens, math.nan) * q for (tokens, w), q in found if weigh(w))
    assert mean == pytest.approx(case.truth(case.f), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(1, 3))
def test_texts_of_awrs(case: Case, max_rejects: int) -> None:
    check_text(case, Awrs(case.law, max_rejects=max_rejects))


@settings(max_examples=5, deadline=None)
@given(cases(longest=1), st.integers(1, 3))
def test_texts_of_awrs_two_loop(case: Case, max_rejects: int) -> None:
    check_text(case, Awrs(case.law, "two_loop", max_rejects), races=2)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_texts_of_masking(case: Case) -> None:
    check_text(case, Masking(case.law))


@pytest.mark.parametrize("make", [Awrs, Masking])
def test_texts_without_their_weights_are_biased(make: Callable[..., Sampler[Any]]) -> None:
    """The control: the same search, and it finds a model, a language and a function that fail."""

    @CONTROL
    @given(cases())
    def search(case: Case) -> None:
        check_text(case, make(case.law), weigh=one)

    with pytest.raises(AssertionError):
        search()


def check_population(
    case: Case,
    sampler: Sampler[Any],
    ess: float,
    tokens_per_round: int,
    weigh: Weigh = weight,
    resampled: list[int] | None = None,
) -> None:
    """Assert that the weighted texts of two particles are unbiased, potential included."""
    steps = Steps(case, sampler, races=1)
    longest = 1 + max(map(len, case.language.words))
    plan = Plan(2, ess, tokens_per_round, longest)

    def run(choose: Choose) -> float:
        class Enumerated(Particles):
            def resample(self, uniform: float) -> Any:
                if Particles.resample(copy.copy(self), uniform) is None:
                    return None
                return super().resample(choose(falls(self.log_weights)))

        def answer(request: Request) -> Continuation:
            tokens, log_weight = request.tokens, 0.0
            for _ in range(request.max_tokens):
                token, step = choose(steps.after(tokens))
                log_weight += step
                if token is None:
                    break
                tokens = (*tokens, token)
                if token == EOS:
                    break
            spelled = "".join(map(str, tokens)).removesuffix(str(EOS))
            ended = tokens[-1:] == (EOS,)
            return Continuation(tokens[len(request.tokens) :], log_weight, ended, spelled)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(population_module, "Particles", Enumerated)
            found = drive(
                population(plan, lambda text: case.potential.get(text, 0.5)),
                lambda requests: [answer(request) for request in requests],
            )
        if resampled is not None:
            resampled.append(found.resamplings)
        return sum(weigh(p.log_weight) * case.f.get(p.text, 0.0) for p in found.particles) / 2

    results = list(every(run))
    assert math.fsum(chance for _, chance in results) == pytest.approx(1.0)
    mean = math.fsum(value * chance for value, chance in results)
    target = {word: value * math.exp(case.potential[word]) for word, value in case.f.items()}
    assert mean == pytest.approx(case.truth(target), abs=1e-9)


def falls(log_weights: np.ndarray[Any, Any]) -> list[tuple[float, float]]:
    """Where the random number of a resampling can fall without a difference, and how probably."""
    count = log_weights.size
    rungs = np.cumsum(normalized(log_weights)) * count
    edges = sorted(
        {0.0, 1.0, *(float(r - i) for r in rungs for i in range(count) if 0 < r - i < 1)}
    )
    return [((a + b) / 2, b - a) for a, b in pairwise(edges)]


@settings(max_examples=15, deadline=None)
@given(cases(longest=1), st.sampled_from([0.0, 0.8, 1.0]), st.integers(1, 2))
def test_populations_of_awrs(case: Case, ess: float, tokens_per_round: int) -> None:
    check_population(case, Awrs(case.law, max_rejects=2), ess, tokens_per_round)


@settings(max_examples=15, deadline=None)
@given(cases(longest=2), st.sampled_from([0.8, 1.0]))
def test_populations_of_masking(case: Case, ess: float) -> None:
    check_population(case, Masking(case.law), ess, tokens_per_round=1)


def test_populations_without_their_weights_are_biased() -> None:
    @CONTROL
    @given(cases(longest=1))
    def search(case: Case) -> None:
        check_population(case, Masking(case.law), 1.0, 1, weigh=one)

    with pytest.raises(AssertionError):
        search()


def test_resampling_happens_in_these_tests() -> None:
    resampled: list[int] = []
    language = Words(("0", "1", "22"), ())
    values = dict.fromkeys(language.words, 1.0)
    case = Case(ToyModel(3), SamplingLaw(), language, values, values)
    check_population(case, Masking(case.law), 1.0, 1, resampled=resampled)
    assert max(resampled) == 2
