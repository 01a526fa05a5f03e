# SPDX-License-Identifier: Apache-2.0
"""The two ways to an engine, on a fake one: what is asked, what is read back, what is refused."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from logits_processors.awrs import Awrs
from logits_processors.law import SamplingLaw
from logits_processors.population import Population
from logits_processors.session import Record
from logits_processors.vocabulary import Vocabulary
from logits_processors.xgrammar_constraint import compile_xgrammar
from vllm_ext import smc

EOS = 3
VOCABULARY = Vocabulary((b"0", b"1", b"2", b""), eos_ids=(EOS,))
PATTERN = "0[01]2?|111"
SPEC = smc.Spec("regex", PATTERN)
PROMPT = (2, 2)
OPTIONS: dict[str, Any] = {"particles": 6, "ess": 0.9, "tokens_per_round": 2, "max_tokens": 5}


def spell(tokens: Any) -> str:
    return VOCABULARY.spell(tokens).decode()


def serve(prompt: list[int], max_tokens: int, keys: dict[str, Any]) -> tuple[list[int], Record]:
    """What vLLM with the plugin would do, by the real sampler on a random model."""
    count = keys["constraint_prefix"]
    tokens = prompt[len(prompt) - count :] if count else []
    assert tuple(prompt[: len(prompt) - count]) == PROMPT
    constraint = compile_xgrammar("regex", keys["constraint_regex"], VOCABULARY).start()
    assert all(map(constraint.accept, tokens))
    sampler = Awrs(SamplingLaw(0.5), keys.get("constraint_estimator", "recursive"))
    state = sampler.start(constraint, keys["constraint_seed"])
    record = Record("", [], [], 0, 0, "incomplete")
    while len(record.token_ids) < max_tokens and record.state == "incomplete":
        row = np.random.default_rng([5, *tokens, *record.token_ids]).normal(size=4)
        if [*tokens, *record.token_ids] == [1, 1]:
            row[1] = -np.inf  # the third "1" never comes: a dead end
        draw = sampler.step(state, row)
        token = EOS if draw.token is None else draw.token
        record.token_ids.append(token)
        record.log_weights.append(draw.log_weight)
        record.checks += draw.checks
        if draw.token is None:
            record.state = "dead_end"
        else:
            sampler.advance(state, token)
            record.state = "complete" if token == EOS else "incomplete"
    return record.token_ids, record


Alter = Callable[[Record], None]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An `LLM` whose requests are kept, and whose records can be altered."""
    fake = SimpleNamespace(asked=[], alter=lambda record: None)

    def generate(llm: Any, prompts: Any, params: Any) -> list[Any]:
        fake.asked.append(params)
        samples = []
        for prompt, p in zip(prompts, params, strict=True):
            tokens, record = serve(prompt["prompt_token_ids"], p.max_tokens, p.extra_args)
            fake.alter(record)
            samples.append(SimpleNamespace(token_ids=tokens, record=record))
        return samples

    monkeypatch.setattr("vllm_ext.constraints.generate", generate)
    fake.get_tokenizer = lambda: SimpleNamespace(
        encode=lambda text: [VOCABULARY.tokens.index(c.encode()) for c in text],
        decode=lambda tokens, skip_special_tokens: spell(tokens),
    )
    return fake


def sample(fake: SimpleNamespace, **options: Any) -> Population:
    llm: Any = fake
    prompt = options.pop("prompt", "22")
    return smc.sample(llm, prompt, SPEC, **{**OPTIONS, "temperature": 0.5, **options})


def test_offline(offline: SimpleNamespace) -> None:
    found = sample(offline, top_k=0, top_p=1.0, options={"constraint_estimator": "two_loop"})
    assert {p.text for p in found.particles if p.complete} <= {"00", "01", "002", "012", "111"}
    assert all(p.tokens[-1] == EOS for p in found.particles if p.complete)
    first, *later = offline.asked
    assert found.rounds == 1 + len(later) > 1
    assert len(first) == 6
    assert {p.max_tokens for p in first} == {2}
    assert [p.extra_args["constraint_prefix"] for p in first] == [0] * 6
    assert {p.extra_args["constraint_prefix"] for p in later[0]} == {2}
    assert first[0].extra_args == {
        "constraint_regex": PATTERN,
        "constraint_method": "awrs",
        "constraint_estimator": "two_loop",
        "constraint_seed": first[0].extra_args["constraint_seed"],
        "constraint_prefix": 0,
    }
    assert (first[0].temperature, first[0].n) == (0.5, 1)
    assert found.checks > 0


def test_the_evidence_is_the_mass(offline: SimpleNamespace) -> None:
    law, mass = SamplingLaw(0.5), 0.0
    for text in ("00", "01", "002", "012"):
        tokens, log_p = [*map(int, text), EOS], 0.0
        for i, token in enumerate(tokens):
            log_p += law.log_probs(np.random.default_rng([5, *tokens[:i]]).normal(size=4))[token]
        mass += math.exp(log_p)
    runs = [math.exp(sample(offline, seed=seed).log_evidence) for seed in range(60)]
    error = np.std(runs) / math.sqrt(len(runs))
    assert abs(np.mean(runs) - mass) < 3 * error < 0.5 * mass


def test_dead_ends_have_no_weight(offline: SimpleNamespace) -> None:
    runs = [sample(offline, seed=seed, ess=0.0) for seed in range(8)]
    dead = [p for run in runs for p in run.particles if not p.complete]
    assert dead
    assert {p.text for p in dead} == {"11"}
    assert all(p.log_weight == -math.inf for p in dead)


def test_token_ids_and_potentials(offline: SimpleNamespace) -> None:
    seen = set()

    def potential(text: str) -> float:
        seen.add(text)
        return 2.0 * text.count("2")

    found = sample(offline, prompt=PROMPT, potential=potential, ess=0.0)
    plain = sample(offline, prompt=PROMPT, ess=0.0)
    assert "00" in seen or "01" in seen
    for scored, bare in zip(found.particles, plain.particles, strict=True):
        assert scored.tokens == bare.tokens
        if scored.complete:
            assert scored.log_weight == pytest.approx(
                bare.log_weight + 2.0 * scored.text.count("2")
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"particles": 0}, "at least 1 particle"),
        ({"ess": 2.0}, "a share from 0 to 1"),
        ({"tokens_per_round": 0}, "tokens_per_round=0"),
        ({"method": "cars"}, "method='cars': SMC needs a weight.*awrs and masking"),
        ({"method": "asap"}, "method='asap'"),
        ({"temperature": 0.0}, "temperature=0.0: above 0"),
        ({"options": {"constraint_prefix": 3}}, "constraint_prefix.*SMC sets itself"),
        ({"options": {"top_k": 3}}, "keys of the constraint's request"),
    ],
)
def test_bad_arguments_are_refused(
    offline: SimpleNamespace, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample(offline, **options)
    assert offline.asked == []


def test_failures_are_told(offline: SimpleNamespace) -> None:
    def fail(record: Record) -> None:
        record.state, record.error = "error", "predicate 'sql' raised"

    def lose(record: Record) -> None:
        record.state, record.log_weights[0] = "incomplete", math.nan

    for alter, message in ((fail, "predicate 'sql' raised"), (lose, "lost the weights")):
        offline.alter = alter
        with pytest.raises(RuntimeError, match=message):
            sample(offline)


def test_the_bar_stays_off_without_a_terminal(
    offline: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    sample(offline)
    assert capsys.readouterr().err == ""
    sample(offline, show_progress=True)
    assert "SMC" in capsys.readouterr().err


class Handler(BaseHTTPRequestHandler):
    """The routes of vLLM's server that are used."""

    with_records = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self.answer({"object": "list", "data": [{"id": "tiny", "object": "model"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert asked["model"] == "tiny"
        if self.path == "/tokenize":
            return self.answer({"tokens": [int(c) for c in asked["prompt"]]})
        if self.path == "/detokenize":
            return self.answer({"prompt": spell(asked["tokens"])})
        assert self.path == "/v1/completions"
        assert (asked["temperature"], asked["top_k"], asked["top_p"]) == (0.5, 0, 1.0)
        tokens, record = serve(asked["prompt"], asked["max_tokens"], asked["vllm_xargs"])
        choice = {"index": 0, "text": "", "finish_reason": "stop", "token_ids": tokens}
        weights = [w if math.isfinite(w) else None for w in record.log_weights]
        field = {"constraint": [{**vars(record), "log_weights": weights}]}
        return self.answer(
            {
                "id": "1",
                "object": "text_completion",
                "created": 0,
                "model": "tiny",
                "choices": [choice],
                **(field if self.with_records else {}),
            }
        )

    def answer(self, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


async def over_http(url: str, prompt: Any = "22") -> Population:
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=url, api_key="none") as client:
        return await smc.sample_async(client, prompt, SPEC, **OPTIONS, temperature=0.5)


@pytest.mark.parametrize("prompt", ["22", PROMPT])
def test_over_http_as_offline(url: str, offline: SimpleNamespace, prompt: Any) -> None:
    assert asyncio.run(over_http(url, prompt)) == sample(offline)


def test_a_server_without_the_plugin_is_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "with_records", False)
    with pytest.raises(RuntimeError, match="VLLM_PLUGINS=vllm_ext"):
        asyncio.run(over_http(url))
