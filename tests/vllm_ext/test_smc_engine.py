# SPDX-License-Identifier: Apache-2.0
"""SMC on real engines, against the samplers on the model's own logits; the server speculates."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logits_processors.awrs import Awrs
from logits_processors.law import SamplingLaw
from logits_processors.population import (
    Continuation,
    Plan,
    Population,
    Request,
    drive,
    population,
)
from logits_processors.vocabulary import Vocabulary
from logits_processors.xgrammar_constraint import compile_xgrammar
from tests.vllm_ext.engine import make_engine
from tests.vllm_ext.server import Server
from vllm_ext import constraints, smc

pytestmark = pytest.mark.engine

PATTERN = "[abc]{2,5}|x[yz]{4}"
PROMPT = [10, 20, 30, 40, 50]
PLAN = Plan(particles=8, ess=0.9, tokens_per_round=2, max_tokens=6, seed=4)
BLOCK = 32
ROUNDS = [PLAN, Plan(8, 0.0, 1, 6, 5), Plan(8, 0.0, 6, 6, 5)]

Submit = Callable[[list[Request]], list[Continuation]]


@pytest.fixture(scope="module")
def cores(served_model: Path) -> Submit:
    """The package's samplers on logits by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(served_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(served_model)
    vocabulary = Vocabulary.from_tokenizer(tokenizer, network.config.vocab_size)
    compiled, sampler = compile_xgrammar("regex", PATTERN, vocabulary), Awrs(SamplingLaw())

    def answer(request: Request) -> Continuation:
        constraint = compiled.start()
        assert all(map(constraint.accept, request.tokens))
        state, tokens, log_weight = sampler.start(constraint, request.seed), [], 0.0
        ended = False
        while len(tokens) < request.max_tokens and not ended:
            with torch.inference_mode():
                ids = torch.tensor([[*PROMPT, *request.tokens, *tokens]])
                row = network(ids).logits[0, -1].numpy()
            draw = sampler.step(state, row)
            assert draw.token is not None
            sampler.advance(state, draw.token)
            tokens.append(draw.token)
            log_weight += draw.log_weight
            ended = draw.token in vocabulary.eos_ids
        text = vocabulary.spell([*request.tokens, *tokens]).decode()
        return Continuation(tuple(tokens), log_weight, ended, text)

    return lambda requests: [answer(request) for request in requests]


def same(found: Population, expected: Population) -> None:
    assert [p.tokens for p in found.particles] == [p.tokens for p in expected.particles]
    assert [p.text for p in found.particles] == [p.text for p in expected.particles]
    weights = [[p.log_weight for p in one.particles] for one in (found, expected)]
    np.testing.assert_allclose(weights[0], weights[1], rtol=0, atol=1e-3)
    assert found.log_evidence == pytest.approx(expected.log_evidence, abs=1e-3)
    assert (found.rounds, found.resamplings) == (expected.rounds, expected.resamplings)


@pytest.fixture(scope="module")
def llm(served_model: Path) -> Iterator[Any]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    engine = make_engine(served_model, None, block_size=BLOCK)
    yield engine
    engine.llm_engine.engine_core.shutdown()


def test_offline(llm: Any, cores: Submit) -> None:
    for plan in ROUNDS:
        found = smc.sample(llm, PROMPT, smc.Spec("regex", PATTERN), **vars(plan))
        same(found, drive(population(plan), cores))
    assert drive(population(PLAN), cores).resamplings > 0


def prefix_cache(llm: Any) -> np.ndarray[Any, Any]:
    """Tokens looked up in vLLM's prefix cache so far, and those that were found."""
    counted = {metric.name: metric.value for metric in llm.get_metrics() if "prefix" in metric.name}
    return np.array([counted[f"vllm:prefix_cache_{what}"] for what in ("queries", "hits")])


def test_particles_are_found_in_the_prefix_cache(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every whole block of a particle that comes back, and not only those of the prompt."""
    generate = constraints.generate
    rounds: list[list[int]] = []

    def watched(llm: Any, prompts: list[Any], params: Any) -> Any:
        rounds.append([len(prompt["prompt_token_ids"]) for prompt in prompts])
        return generate(llm, prompts, params)

    monkeypatch.setattr(constraints, "generate", watched)

    def hits(tokens_per_round: int, prompt: range) -> int:
        rounds.clear()
        plan = Plan(8, 0.9, tokens_per_round, max_tokens=60, seed=4)
        before = prefix_cache(llm)
        found = smc.sample(llm, prompt, smc.Spec("regex", "[a-z]{50,58}"), **vars(plan))
        queries, hits = prefix_cache(llm) - before
        assert queries == sum(map(sum, rounds))  # or a request was looked up more than once
        assert (found.resamplings > 0) == (len(rounds) > 1)
        return int(hits)

    prompt = range(100, 100 + BLOCK + 8)
    at_once = hits(60, prompt)
    assert len(rounds) == 1
    in_rounds = hits(12, range(150, 150 + BLOCK + 8))
    assert len(rounds) >= 5
    again = sum((length - 1) // BLOCK * BLOCK for lengths in rounds[1:] for length in lengths)
    assert in_rounds >= again > sum(len(lengths) * BLOCK for lengths in rounds[1:])
    # The control: particles that do not come back share the prompt at most.
    assert at_once <= 7 * BLOCK
    assert in_rounds > 2 * at_once


def test_over_http(server: Server, cores: Submit) -> None:
    from openai import AsyncOpenAI

    async def run(**options: Any) -> Population:
        async with AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
            return await smc.sample_async(
                client, PROMPT, smc.Spec("regex", PATTERN), **{**vars(PLAN), **options}
            )

    same(asyncio.run(run()), drive(population(PLAN), cores))

    def potential(text: str) -> float:
        return 0.5 * text.count("a")

    found = asyncio.run(run(potential=potential))
    same(found, drive(population(PLAN, potential), cores))
