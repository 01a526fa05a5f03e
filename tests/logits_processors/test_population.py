# SPDX-License-Identifier: Apache-2.0
"""Populations against enumeration: every branch that chance can take, with its probability."""

import asyncio
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import EOS, GRAMMAR, TINY, ToyModel, exact

from logits_processors import population as module
from logits_processors import smc
from logits_processors.awrs import Awrs
from logits_processors.law import SamplingLaw
from logits_processors.masking import Masking
from logits_processors.population import Continuation, Plan, drive, drive_async, population
from logits_processors.smc import Particles, systematic_resample
from logits_processors.xgrammar_constraint import compile_xgrammar

LAW = SamplingLaw()
END = "."


class Chance:
    """Takes each branch of a random process once; `walk` yields the probability of each path."""

    def __init__(self):
        self.path = []

    def pick(self, probabilities):
        """Index of the branch taken here; branches of probability 0 are skipped."""
        if self.depth == len(self.path):
            self.path.append([[(i, p) for i, p in enumerate(probabilities) if p > 0], 0])
        branches, taken = self.path[self.depth]
        self.depth += 1
        index, p = branches[taken]
        self.probability *= p
        return index

    def walk(self):
        while True:
            self.depth, self.probability = 0, 1.0
            yield self
            while self.path and self.path[-1][1] + 1 == len(self.path[-1][0]):
                self.path.pop()
            if not self.path:
                return
            self.path[-1][1] += 1


# A language model over the letters a and b that ends with a full stop, and the texts we want.
MODEL = {
    "": {"a": 0.5, "b": 0.4, END: 0.1},
    "a": {"a": 0.2, "b": 0.1, END: 0.7},
    "b": {"a": 0.6, "b": 0.3, END: 0.1},
}
WANTED = ("a", "ab", "ba")
JOINT = {
    "a": 0.5 * 0.7,
    "ab": 0.5 * 0.1 * 1.0,
    "ba": 0.4 * 0.6 * 1.0,
}


def law_after(text):
    return MODEL.get(text, {END: 1.0})


def masked(text):
    """Allowed letters after a text with their probabilities, and their mass."""
    allowed = {
        letter: p
        for letter, p in law_after(text).items()
        if (text in WANTED if letter == END else any(w.startswith(text + letter) for w in WANTED))
    }
    mass = sum(allowed.values())
    return {letter: p / mass for letter, p in allowed.items()}, mass


def fake_engine(chance):
    """Masking with its weights, where chance is enumerated."""

    def submit(requests):
        return [answer(request) for request in requests]

    def answer(request):
        text, log_weight, added = "".join(map(chr, request.tokens)), 0.0, ()
        for _ in range(request.max_tokens):
            letters, mass = masked(text)
            letter = list(letters)[chance.pick(letters.values())]
            log_weight += math.log(mass)
            added += (ord(letter),)
            if letter == END:
                return Continuation(added, log_weight, True, text)
            text += letter
        return Continuation(added, log_weight, False, text)

    return submit


def enumerated_resample(chance):
    """Systematic resampling whose uniform is integrated out: it decides by intervals."""

    def resample(log_weights, uniform):
        ladder = np.cumsum(smc.normalized(log_weights)) * log_weights.size
        cuts = np.unique(np.round(np.concatenate(([0.0, 1.0], ladder % 1.0)), 12))
        lengths = np.diff(cuts)
        i = chance.pick(lengths)
        return systematic_resample(log_weights, (cuts[i] + cuts[i + 1]) / 2)

    return resample


def expectation(f, monkeypatch, plan, potential=None):
    """E[mean of w f(x)] and E[exp(log_evidence)] over every path of chance; and the paths."""
    chance, total, evidence, probability, paths = Chance(), 0.0, 0.0, 0.0, 0
    for path in chance.walk():
        monkeypatch.setattr(smc, "systematic_resample", enumerated_resample(chance))
        found = drive(population(plan, potential), fake_engine(path))
        weighted = [math.exp(p.log_weight) * f.get(p.text, 0.0) for p in found.particles]
        total += path.probability * float(np.mean(weighted))
        evidence += path.probability * math.exp(found.log_evidence)
        probability += path.probability
        paths += 1
    assert probability == pytest.approx(1.0)
    return total, evidence, paths


def truth(f, potential=None):
    return sum(
        p * f.get(t, 0.0) * (math.exp(potential(t)) if potential else 1.0) for t, p in JOINT.items()
    )


ONE = dict.fromkeys(WANTED, 1.0)
PLAN = Plan(particles=2, ess=1.0, tokens_per_round=1, max_tokens=3)


def fancy(text):
    """A log score that disagrees with itself on the way: high for "b", low for "ba"."""
    return {"": 3.0, "a": 0.4, "b": 2.0, "ab": -1.0, "ba": 0.3}[text]


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.floats(-5, 5), min_size=3, max_size=3),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([0.0, 0.95, 1.0]),
    st.booleans(),
)
def test_weighted_functions_are_unbiased(values, per_round, ess, scored):
    f = dict(zip(WANTED, values, strict=True))
    plan = Plan(particles=2, ess=ess, tokens_per_round=per_round, max_tokens=3)
    potential = fancy if scored else None
    with pytest.MonkeyPatch.context() as patch:
        total, evidence, _ = expectation(f, patch, plan, potential)
    assert total == pytest.approx(truth(f, potential), abs=1e-9)
    assert evidence == pytest.approx(truth(ONE, potential), abs=1e-9)


def test_three_particles_and_real_resampling(monkeypatch):
    plan = Plan(particles=3, ess=1.0, tokens_per_round=1, max_tokens=3)
    total, _, paths = expectation({"ba": 1.0}, monkeypatch, plan, fancy)
    assert total == pytest.approx(truth({"ba": 1.0}, fancy), abs=1e-9)
    assert paths > 50


real_resample, real_reweight = Particles.resample, Particles.reweight


def forget_evidence(self, uniform):
    evidence = self._log_evidence
    ancestors = real_resample(self, uniform)
    self._log_evidence = evidence
    return ancestors


def normalise_each_step(self, increments):
    real_reweight(self, increments)
    self.log_weights = self.log_weights - smc.log_mean(self.log_weights)


@pytest.mark.parametrize(
    ("name", "mutant"), [("resample", forget_evidence), ("reweight", normalise_each_step)]
)
def test_lost_weights_are_noticed(monkeypatch, name, mutant):
    monkeypatch.setattr(Particles, name, mutant)
    _, evidence, _ = expectation(ONE, monkeypatch, PLAN)
    assert abs(evidence - truth(ONE)) > 0.05


def test_a_potential_that_is_not_telescoped_is_noticed(monkeypatch):
    real = module._Member.grown
    monkeypatch.setattr(module._Member, "grown", lambda self, answer, score: real(self, answer, 0))
    total, _, _ = expectation({"ba": 1.0}, monkeypatch, PLAN, fancy)
    assert abs(total - truth({"ba": 1.0}, fancy)) > 0.05


def test_a_potential_may_kill(monkeypatch):
    def hard(text):
        return -math.inf if text.startswith("a") else 0.5

    for plan in (PLAN, Plan(particles=2, ess=0.0, tokens_per_round=3, max_tokens=3)):
        total, evidence, _ = expectation(ONE, monkeypatch, plan, hard)
        assert (total, evidence) == pytest.approx((truth(ONE, hard),) * 2, abs=1e-9)


def test_texts_beyond_the_limit_have_weight_0(monkeypatch):
    plan = Plan(particles=2, ess=1.0, tokens_per_round=2, max_tokens=2)
    total, evidence, _ = expectation(ONE, monkeypatch, plan)
    assert (total, evidence) == pytest.approx((JOINT["a"],) * 2, abs=1e-9)


def toy_engine(sampler, model, compiled):
    """The real samplers, re-submitted as a server would see them."""

    def submit(requests):
        answers = []
        for request in requests:
            constraint = compiled.start()
            assert all(map(constraint.accept, request.tokens))
            state, tokens, log_weight = sampler.start(constraint, request.seed), [], 0.0
            checks = masks = 0
            while len(tokens) < request.max_tokens and EOS not in tokens:
                draw = sampler.step(state, model.logits((*request.tokens, *tokens)))
                checks, masks = checks + draw.checks, masks + draw.used_mask
                log_weight += draw.log_weight
                if draw.token is None:
                    break
                sampler.advance(state, draw.token)
                tokens.append(draw.token)
            text = TINY.spell([*request.tokens, *tokens]).decode()
            answers.append(
                Continuation(tuple(tokens), log_weight, EOS in tokens, text, checks, masks)
            )
        return answers

    return submit


def toy_runs(runs, method=Awrs, potential=None, model=12, **plan):
    model, compiled = ToyModel(model), compile_xgrammar("ebnf", GRAMMAR, TINY)
    submit = toy_engine(method(LAW), model, compiled)
    plans = [Plan(seed=seed, max_tokens=6, **plan) for seed in range(runs)]
    return model, [drive(population(plan, potential), submit) for plan in plans]


def in_band(values, expected, errors=3.0):
    values = np.array(values)
    return abs(values.mean() - expected) < errors * values.std() / math.sqrt(values.size)


@pytest.mark.parametrize(
    ("method", "ess", "per_round"), [(Awrs, 0.9, 1), (Masking, 0.9, 2), (Awrs, 0.0, 6)]
)
def test_the_probability_of_the_constraint_is_estimated(method, ess, per_round):
    model, found = toy_runs(40, method, particles=8, ess=ess, tokens_per_round=per_round)
    law, mass = exact(model, LAW)
    evidence = np.exp([p.log_evidence for p in found])
    assert in_band(evidence, mass)
    assert evidence.std() / math.sqrt(evidence.size) < 0.1 * mass
    zeros = [
        np.mean([math.exp(p.log_weight) * (p.text == "00000") for p in run.particles])
        for run in found
    ]
    assert in_band(zeros, mass * law[(0, 0, 0, 0, 0, EOS)])
    assert any(run.resamplings for run in found) == (ess > 0)


def test_unweighted_particles_are_biased():
    model, found = toy_runs(40, particles=8, ess=0.0, tokens_per_round=6, model=10)
    law, mass = exact(model, LAW)
    share = law[(0, 0, 0, 0, 0, EOS)]
    zeros = [np.mean([p.text == "00000" for p in run.particles]) for run in found]
    assert not in_band(zeros, share, errors=6.0)
    weighted = [
        np.mean([math.exp(p.log_weight) * (p.text == "00000") for p in run.particles])
        for run in found
    ]
    assert in_band(weighted, share * mass)


def test_a_potential_shifts_the_posterior():
    def ones(text):
        return 0.7 * text.count("1")

    model, found = toy_runs(40, particles=8, ess=0.9, tokens_per_round=2, potential=ones)
    law, mass = exact(model, LAW)
    expected = mass * sum(p * math.exp(0.7 * text.count(1)) for text, p in law.items())
    assert in_band(np.exp([run.log_evidence for run in found]), expected)
    assert not in_band(np.exp([run.log_evidence for run in found]), mass)


def test_without_resampling_the_rounds_do_not_matter():
    runs = [toy_runs(3, particles=4, ess=0.0, tokens_per_round=k)[1] for k in (1, 2, 6)]
    for one, other in itertools.pairwise(runs):
        for a, b in zip(one, other, strict=True):
            assert [p.tokens for p in a.particles] == [p.tokens for p in b.particles]
            assert a.log_evidence == pytest.approx(b.log_evidence, abs=1e-12)
            assert (a.checks, a.mask_fallbacks) == (b.checks, b.mask_fallbacks)


def test_a_seed_repeats_and_copies_part():
    first, again = (toy_runs(4, particles=8, ess=1.0, tokens_per_round=1)[1] for _ in range(2))
    assert first == again
    assert len({run.particles for run in first}) == 4
    # One ancestor takes all at the second position; its copies must not stay one text.
    seeds = []

    def submit(requests):
        seeds.append([r.seed for r in requests])
        weights = [0.0 if r.tokens or i == 0 else -60.0 for i, r in enumerate(requests)]
        return [
            Continuation((0,), w, len(r.tokens) == 2, "")
            for w, r in zip(weights, requests, strict=True)
        ]

    drive(population(Plan(4, ess=0.9, tokens_per_round=1)), submit)
    assert len(set(seeds[0])) == len(set(seeds[1])) == 4
    assert not set(seeds[0]) & set(seeds[1])
    assert seeds[1] == seeds[2]
    assert max(map(max, seeds)) < 2**53


def test_finished_and_dead_particles_are_not_asked_again():
    asked = []

    def submit(requests):
        asked.append([r.tokens for r in requests])
        kinds = [(0.0, True), (-math.inf, False), (-1.0, False)] if len(asked) == 1 else [(0, True)]
        return [Continuation((7,), w, end, "x") for w, end in kinds]

    found = drive(population(Plan(3, ess=0.0, tokens_per_round=1, seed=3)), submit)
    assert asked == [[(), (), ()], [(7,)]]
    assert [p.log_weight for p in found.particles] == [0.0, -math.inf, -1.0]
    assert found.rounds == 2
    assert found.posterior() == pytest.approx({"x": 1.0})
    assert found.ess == pytest.approx((1 + math.exp(-1)) ** 2 / (1 + math.exp(-2)))


def test_everybody_dies():
    found = drive(
        population(Plan(2)),
        lambda requests: [Continuation((), -math.inf, False, "") for _ in requests],
    )
    assert (found.log_evidence, found.ess, found.posterior()) == (-math.inf, 0.0, {})


def test_waiting_engines_are_driven_alike():
    model, compiled = ToyModel(12), compile_xgrammar("ebnf", GRAMMAR, TINY)
    submit = toy_engine(Awrs(LAW), model, compiled)

    async def later(requests):
        await asyncio.sleep(0)
        return submit(requests)

    plan = Plan(8, ess=0.9, tokens_per_round=1, max_tokens=6)
    assert asyncio.run(drive_async(population(plan), later)) == drive(population(plan), submit)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"particles": 0}, "at least 1 particle"),
        ({"ess": 1.5}, "a share from 0 to 1"),
        ({"ess": -0.1}, "a share from 0 to 1"),
        ({"tokens_per_round": 0}, "tokens_per_round=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
    ],
)
def test_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Plan(**arguments)


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_bad_potentials_are_refused(score):
    with pytest.raises(ValueError, match="log score"):
        toy_runs(1, particles=2, potential=lambda text: score)


def test_an_engine_that_stops_early_is_reported():
    def short(requests):
        return [Continuation((1,), 0.0, False, "") for _ in requests]

    with pytest.raises(RuntimeError, match="after 1 of 8 tokens"):
        drive(population(Plan(2)), short)
    with pytest.raises(RuntimeError, match="1 continuations for 2 requests"):
        drive(population(Plan(2)), lambda requests: short(requests)[:1])


def test_a_round_that_only_finished_texts_survive_is_the_last():
    """One text finishes with nearly all of the weight; resampling leaves copies of it alone."""
    asked = []

    def submit(requests):
        asked.append(len(requests))
        return [
            Continuation((1, EOS), 0.0, True, "a", 1, 0)
            if i == 0
            else Continuation((1, 1), -50.0, False, "aa", 1, 0)
            for i, _ in enumerate(requests)
        ]

    drawn = drive(population(Plan(particles=4, tokens_per_round=2, max_tokens=8)), submit)
    assert asked == [4]
    assert all(particle.complete for particle in drawn.particles)
    assert drawn.log_evidence == pytest.approx(math.log(0.25))
    assert drawn.resamplings == 1
