# SPDX-License-Identifier: Apache-2.0
"""ASAp, CARS and the trie they share, against the enumerated conditional law."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats
from toy_model import EOS, GRAMMAR, LANGUAGE, TINY, ToyModel, exact, generate, spell

from logits_processors.asap import Asap
from logits_processors.cars import Cars
from logits_processors.law import SamplingLaw
from logits_processors.masking import Masking
from logits_processors.prefix_trie import PrefixTrie, bound_children
from logits_processors.sampler import State
from logits_processors.xgrammar_constraint import compile_xgrammar

LAW = SamplingLaw()
MODEL = ToyModel(12)
COMPILED = compile_xgrammar("ebnf", GRAMMAR, TINY)
TRUTH, MASS = exact(MODEL, LAW)


def allowed_row(prefix, model=MODEL):
    """log p of the allowed tokens, from the list of texts and not from an engine."""
    row = np.full(TINY.size, -np.inf)
    for text in map(spell, LANGUAGE):
        if text[: len(prefix)] == tuple(prefix) and len(text) > len(prefix):
            row[text[len(prefix)]] = LAW.log_probs(model.logits(prefix))[text[len(prefix)]]
    return row


def implied_law(trie, model=MODEL):
    """Log probability and log weight with which ASAp draws each text from a frozen trie."""
    law = {}
    for text in map(spell, LANGUAGE):
        node, log_prob, log_weight = trie.root, 0.0, 0.0
        for i, token in enumerate(text):
            row = allowed_row(text[:i], model)
            scores, log_live = bound_children(node, row)
            log_prob += scores[token] - log_live
            log_weight += log_live - (scores[token] - row[token])
            node = node.children.get(token) if node else None
        law[text] = (log_prob, log_weight)
    return law


def total_variation(law):
    return 0.5 * sum(abs(math.exp(law[t][0]) - TRUTH[t]) for t in TRUTH)


def fits(counts, truth=TRUTH):
    """p-value of the chi-square test of counted texts against the exact law."""
    total = sum(counts.values())
    assert set(counts) <= set(truth)
    order = sorted(truth, key=lambda t: truth[t])
    expected = np.array([truth[t] * total for t in order])
    observed = np.array([counts[t] for t in order], dtype=float)
    rare = int(np.searchsorted(np.cumsum(expected), 5.0)) + 1
    observed = np.append(observed[rare:], observed[:rare].sum())
    expected = np.append(expected[rare:], expected[:rare].sum())
    return stats.chisquare(observed, expected).pvalue


def test_asap_starts_as_masking_and_converges():
    trie = PrefixTrie()
    sampler = Asap(LAW, trie)
    distance, bound = [total_variation(implied_law(trie))], [0.0]
    for seed in range(150):
        tokens, _, _ = generate(sampler, MODEL, COMPILED, seed)
        assert tokens in TRUTH
        distance.append(total_variation(implied_law(trie)))
        bound.append(trie.root.log_live)
    masked = {}
    for text in TRUTH:
        rows = [allowed_row(text[:i]) for i in range(len(text))]
        masked[text] = sum(r[t] - np.logaddexp.reduce(r) for r, t in zip(rows, text, strict=True))
    law = implied_law(PrefixTrie())
    assert all(law[t][0] == pytest.approx(masked[t], abs=1e-12) for t in TRUTH)
    assert distance[0] > 0.1  # what masking stays at
    assert distance[-1] < 0.005
    assert all(a >= b - 1e-12 for a, b in pairwise(bound))
    assert bound[-1] >= math.log(MASS) - 1e-12
    assert bound[-1] == pytest.approx(math.log(MASS), abs=0.01)


def test_asap_weights_are_proper_in_every_state_of_the_trie():
    trie = PrefixTrie()
    sampler = Asap(LAW, trie)
    for seed in range(20):
        for text, (log_prob, log_weight) in implied_law(trie).items():
            joint = MODEL.log_prob(text, LAW)
            assert log_prob + log_weight == pytest.approx(joint, abs=1e-10)
        frozen = implied_law(trie)
        tokens, log_weight, _ = generate(sampler, MODEL, COMPILED, seed)
        assert log_weight == pytest.approx(frozen[tokens][1], abs=1e-10)


def test_fully_explored_trie_is_exact():
    trie = PrefixTrie()
    for text in map(spell, LANGUAGE):
        node = trie.root
        for i, token in enumerate(text):
            node = trie.observe(node, allowed_row(text[:i]), token)
    assert trie.root.log_live == pytest.approx(math.log(MASS), abs=1e-12)
    assert total_variation(implied_law(trie)) < 1e-12


def cars_counts(draws_per_trie, total, seed=0, sampler=Cars):
    counts = Counter()
    for start in range(0, total, draws_per_trie):
        trie = PrefixTrie()
        for i in range(draws_per_trie):
            tokens, _, _ = generate(sampler(LAW, trie), MODEL, COMPILED, seed + start + i)
        counts[tokens] += 1  # the last draw of each trie
    return counts


def test_cars_first_draw_is_exact():
    assert fits(cars_counts(1, 1000)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("nth", [1, 3, 8])
def test_cars_nth_draw_is_exact(nth):
    assert fits(cars_counts(nth, 3000 * nth, seed=10**6)) > 1e-3


@pytest.mark.parametrize("sampler", [Asap, lambda law, trie: Masking(law)])
def test_the_fit_can_fail(sampler):
    assert fits(cars_counts(1, 1500, sampler=sampler)) < 1e-6


def interleaved(sampler_class, requests, seed):
    """Run requests in lock step on one trie, as an engine's batch does; one text of each."""
    sampler = sampler_class(LAW, PrefixTrie())
    running = [(sampler.start(COMPILED.start(), seed + i), []) for i in range(requests)]
    texts = []
    while running:
        drawn = [sampler.step(state, MODEL.logits(tokens)) for state, tokens in running]
        left = []
        for (state, tokens), draw in zip(running, drawn, strict=True):
            if draw.restart:
                sampler.restart(state)
                tokens = []
            else:
                assert draw.token is not None
                sampler.advance(state, draw.token)
                tokens = [*tokens, draw.token]
            if tokens[-1:] == [EOS]:
                texts.append(tuple(tokens))
            else:
                left.append((state, tokens))
        running = left
    return texts


def test_cars_is_exact_when_requests_share_a_trie():
    counts = Counter(t for batch in range(100) for t in interleaved(Cars, 10, 1000 * batch))
    assert fits(counts) > 1e-3


def staggered(requests, batch, kept, seed):
    """Run requests that enter one by one and end when rejected; the first complete ones."""
    arrivals = np.random.default_rng(seed)
    sampler = Cars(LAW, PrefixTrie())
    running, waiting, texts = [], list(range(requests)), {}
    while waiting or running:
        while waiting and len(running) < batch and arrivals.random() < 0.6:
            i = waiting.pop(0)
            running.append((i, sampler.start(COMPILED.start(), (seed << 20) + i), []))
        drawn = [sampler.step(state, MODEL.logits(tokens)) for _, state, tokens in running]
        left = []
        for (i, state, tokens), draw in zip(running, drawn, strict=True):
            if draw.restart:
                sampler.restart(state)
                continue
            sampler.advance(state, draw.token)
            tokens.append(draw.token)
            if draw.token == EOS:
                texts[i] = tuple(tokens)
            else:
                left.append((i, state, tokens))
        running = left
    return [texts[i] for i in sorted(texts)][:kept]


def test_cars_is_exact_when_requests_come_and_go():
    counts = Counter(t for seed in range(150) for t in staggered(30, 8, 10, seed))
    assert sum(counts.values()) > 1000
    assert fits(counts) > 1e-3


def test_cars_that_come_and_go_without_a_coin_are_biased(monkeypatch):
    monkeypatch.setattr("logits_processors.cars.uniforms", lambda *_, **__: np.array([1e-300]))
    counts = Counter(t for seed in range(150) for t in staggered(30, 8, 10, seed))
    assert fits(counts) < 1e-6


def test_cars_without_its_coin_is_biased(monkeypatch):
    monkeypatch.setattr("logits_processors.cars.uniforms", lambda *_, **__: np.array([1e-300]))
    counts = Counter(t for batch in range(100) for t in interleaved(Cars, 10, 1000 * batch))
    assert fits(counts) < 1e-6


def test_cars_restarts_become_rare():
    early = late = 0
    for first in range(0, 500, 100):
        trie = PrefixTrie()
        for seed in range(100):
            _, log_weight, draws = generate(Cars(LAW, trie), MODEL, COMPILED, first + seed)
            assert log_weight == 0.0
            restarts = sum(draw.restart for draw in draws)
            early += restarts if seed < 20 else 0
            late += restarts if seed >= 80 else 0
    assert early > 20
    assert late <= 5


def test_a_full_trie_stops_growing_and_stays_exact():
    counts = Counter()
    for seed in range(0, 1600, 2):
        trie = PrefixTrie(max_nodes=6)
        generate(Cars(LAW, trie), MODEL, COMPILED, seed)
        tokens, _, _ = generate(Cars(LAW, trie), MODEL, COMPILED, seed + 1)
        assert trie.num_nodes == len(list(trie)) <= 6
        counts[tokens] += 1
    assert fits(counts) > 1e-3


def test_discarded_rows_teach_nothing():
    trie = PrefixTrie()
    sampler = Asap(LAW, trie)
    state = sampler.start(COMPILED.start(), 0)
    sampler.step(state, np.array([5.0, -5.0, 9.0, 0.0]))  # a row of an unfinished prompt
    draw = sampler.step(state, MODEL.logits(()))
    assert trie.root.log_rest is None
    sampler.advance(state, draw.token)
    assert trie.root.children[draw.token].log_edge == pytest.approx(
        LAW.log_probs(MODEL.logits(()))[draw.token]
    )


def test_rewind_and_replay_end_where_they_began():
    trie = PrefixTrie()
    sampler = Cars(LAW, trie)
    state = sampler.start(COMPILED.start(), 0)
    for token in (1, 0, 1):
        sampler.step(state, MODEL.logits(()))
        assert sampler.advance(state, token)
    path, promises = list(state.path), list(state.promises)
    sampler.rewind(state, 2)
    assert (state.position, len(state.path)) == (1, 2)
    for token in (0, 1):
        assert sampler.advance(state, token)  # replayed without logits
    assert state.path == path
    assert len(promises) == len(state.promises) == 4
    assert not sampler.advance(state, 2)


def test_cut_off_texts_are_outside_the_language():
    trie = PrefixTrie()
    sampler = Asap(LAW, trie)
    for seed in range(60):
        state = sampler.start(COMPILED.start(), seed)
        tokens = []
        # One token: no text fits, so nothing remains to be drawn.
        draw = sampler.step(state, MODEL.logits(tokens))
        if draw.token is None:
            break
        sampler.advance(state, draw.token)
        sampler.fail(state)
    assert draw.token is None
    assert trie.root.log_live == -math.inf
    assert Cars(LAW, trie).step(sampler.start(COMPILED.start(), 0), MODEL.logits(())).token is None


def test_hopeless_masses_keep_their_precision():
    model = ToyModel(5, rare=-60.0)
    truth, mass = exact(model, LAW)
    trie = PrefixTrie()
    for text in truth:
        node = trie.root
        for i, token in enumerate(text):
            node = trie.observe(node, allowed_row(text[:i], model), token)
    assert trie.root.log_live == pytest.approx(math.log(mass), rel=1e-10)


def test_masking_weight_is_the_allowed_mass():
    row = MODEL.logits(())
    draw = Masking(LAW).step(State(COMPILED.start(), 0), row)
    p = np.exp(LAW.log_probs(row))
    assert draw.log_weight == pytest.approx(math.log(p[0] + p[1]), abs=1e-12)


def test_greedy_and_started_constraints_are_refused():
    with pytest.raises(ValueError, match="temperature 0"):
        Asap(SamplingLaw(0.0), PrefixTrie())
    constraint = COMPILED.start()
    constraint.accept(1)
    with pytest.raises(ValueError, match="already holds 1"):
        Cars(LAW, PrefixTrie()).start(constraint, 0)
    with pytest.raises(ValueError, match="max_nodes=0"):
        PrefixTrie(0)
