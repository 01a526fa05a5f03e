# SPDX-License-Identifier: Apache-2.0
"""Constraints in the whole engine, with and without token trees."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.vllm_ext.engine import VOCAB, make_engine, make_tiny_model, prompts, spec_metrics
from vllm_ext import constraints

pytestmark = pytest.mark.engine

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy"]}},
        "required": ["a", "b"],
    }
)
KINDS: dict[str, dict[str, Any]] = {
    "json_schema": {"constraint_json_schema": SCHEMA},
    "json_validate": {"constraint_json_validate": SCHEMA},
    "ebnf": {"constraint_ebnf": 'root ::= "<" [a-f]+ ">" | "(" root ")"'},
    "lark": {"constraint_lark": 'start: "x" /[0-9]{1,6}/ "y"'},
    "regex": {"constraint_regex": "[ab]{2,30}c"},
    "regex_partial": {"constraint_regex_partial": r"([a-z])\1[0-9]{1,9}\1"},
    "structural_tag": {
        "constraint_structural_tag": json.dumps(
            {
                "type": "structural_tag",
                "format": {
                    "type": "tag",
                    "begin": "<n>",
                    "content": {"type": "json_schema", "json_schema": {"type": "integer"}},
                    "end": "</n>",
                },
            }
        )
    },
    "predicate": {"constraint_predicate": "even", "constraint_argument": "02468"},
}
METHODS = ("awrs", "masking", "asap", "cars")
EOS = 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engines(model: Path, installed_predicates: None) -> Iterator[tuple[Any, Any]]:
    """Plain vLLM, and token trees under preemption and chunked prompts."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    plain = make_engine(model, None, max_num_batched_tokens=1024, max_logprobs=VOCAB)
    drafting = {"method": "dyspec", "num_speculative_tokens": 12, "adaptive": False}
    ours = make_engine(model, drafting, num_gpu_blocks_override=13)
    yield plain, ours
    for engine in (plain, ours):
        engine.llm_engine.engine_core.shutdown()


def params(keys: dict[str, Any], **options: Any) -> Any:
    from vllm import SamplingParams

    defaults = {"max_tokens": 24, "temperature": 1.0, "seed": 5, "detokenize": True}
    return SamplingParams(**{**defaults, **options}, extra_args=keys)


def outcomes(samples: list[constraints.Sample]) -> list[tuple[Any, ...]]:
    return [(s.token_ids, s.record.state, pytest.approx(s.log_weight, abs=1e-3)) for s in samples]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_same_tokens_with_and_without_trees(
    engines: tuple[Any, Any], kind: str, temperature: float
) -> None:
    asked = [
        params({**KINDS[kind], "constraint_method": method}, temperature=temperature, seed=seed)
        for seed, method in enumerate(("awrs", "masking", "awrs", "masking", "awrs", "awrs"))
    ]
    requests = prompts(len(asked), seed=len(kind))
    plain, ours = (constraints.generate(engine, requests, asked) for engine in engines)
    assert outcomes(plain) == outcomes(ours)
    assert all(sample.record.error == "" for sample in plain)
    assert len({tuple(sample.token_ids) for sample in plain}) > 1


@pytest.mark.parametrize("method", ["asap", "cars"])
def test_learning_samplers_with_and_without_trees(engines: tuple[Any, Any], method: str) -> None:
    keys = {"constraint_regex": "[abc]{1,3}", "constraint_method": method}
    request = prompts(1, seed=77)
    for seed in range(4):  # one after the other: the trie learns in the same order
        asked = params(keys, seed=seed, max_tokens=6, logit_bias={EOS: 6.0, 66: 5.0, 67: 5.0})
        plain, ours = (constraints.generate(engine, request, asked) for engine in engines)
        assert outcomes(plain) == outcomes(ours)
        assert [s.attempts for s in plain] == [s.attempts for s in ours]
        assert plain[0].record.state == "complete"


def test_same_tokens_alone_and_in_a_batch(engines: tuple[Any, Any]) -> None:
    requests = prompts(6, seed=3)
    asked = [params(KINDS["regex"], seed=seed) for seed in range(6)]
    together = constraints.generate(engines[0], requests, asked)
    alone = [
        constraints.generate(engines[0], [r], p)[0] for r, p in zip(requests, asked, strict=True)
    ]
    assert [s.token_ids for s in together] == [s.token_ids for s in alone]


def test_preemption_happens_in_these_tests(engines: tuple[Any, Any]) -> None:
    asked = params({"constraint_regex": "[a-z]{90,}"}, max_tokens=100)
    requests = prompts(6, seed=9)
    before = preemptions(engines[1])
    plain, ours = (constraints.generate(engine, requests, asked) for engine in engines)
    assert preemptions(engines[1]) > before
    assert outcomes(plain) == outcomes(ours)


def preemptions(engine: Any) -> int:
    return sum(m.value for m in engine.get_metrics() if m.name == "vllm:num_preemptions")


@pytest.mark.parametrize("method", ["awrs", "masking"])
def test_greedy_equals_structured_outputs(engines: tuple[Any, Any], method: str) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    requests = prompts(4, seed=21)
    shared: dict[str, Any] = {"max_tokens": 40, "temperature": 0.0}
    structured = SamplingParams(
        **shared, structured_outputs=StructuredOutputsParams(json=json.loads(SCHEMA))
    )
    expected = engines[0].generate(requests, structured, use_tqdm=False)
    keys = {"constraint_json_schema": SCHEMA, "constraint_method": method}
    for engine in engines:
        got = constraints.generate(engine, requests, params(keys, **shared, seed=None))
        assert [s.token_ids for s in got] == [list(o.outputs[0].token_ids) for o in expected]


def test_weights_estimate_the_mass_of_the_language(engines: tuple[Any, Any]) -> None:
    """The mean weight of AWRS against the exact mass, by scoring every text."""
    prompt = prompts(1, seed=31)[0]["prompt_token_ids"]
    bias = {EOS: 8.0, 70: 6.0}
    encode = engines[0].get_tokenizer().encode
    letters = [encode(c)[0] for c in "abc"]
    bias |= dict.fromkeys(letters, 7.0)
    texts = [[a, *rest, EOS] for a in letters for rest in ([], *([b] for b in letters))]
    mass = sum(math.exp(score(engines[0], prompt, text, bias)) for text in texts)
    assert 0.01 < mass < 0.9
    keys = {"constraint_regex": "[abc]{1,2}", "constraint_method": "awrs"}
    for engine in engines:
        asked = [params(keys, seed=seed, max_tokens=4, logit_bias=bias) for seed in range(400)]
        request = {"prompt_token_ids": prompt}
        samples = constraints.generate(engine, [request] * 400, asked)
        weights = np.exp([s.log_weight for s in samples])
        error = weights.std(ddof=1) / math.sqrt(weights.size)
        assert abs(weights.mean() - mass) < 3 * error
        assert error < 0.1 * mass
        # The control: without its weights AWRS claims that every text is in the language.
        assert abs(1.0 - mass) > 3 * error


def score(engine: Any, prompt: list[int], text: list[int], bias: dict[int, float]) -> float:
    """Log probability of ``text`` after ``prompt`` under biased logits, token by token."""
    from vllm import SamplingParams

    requests = [{"prompt_token_ids": prompt + text[:i]} for i in range(len(text))]
    asked = SamplingParams(max_tokens=1, temperature=1.0, logprobs=VOCAB, seed=0)
    total = 0.0
    outputs = engine.generate(requests, asked, use_tqdm=False)
    for output, token in zip(outputs, text, strict=True):
        row = np.full(VOCAB, -np.inf)
        for candidate, entry in output.outputs[0].logprobs[0].items():
            row[candidate] = entry.logprob + bias.get(candidate, 0.0)
        total += row[token] - np.logaddexp.reduce(row)
    return float(total)


def test_forbidden_drafts_are_never_sent(engines: tuple[Any, Any]) -> None:
    ours = engines[1]
    keys = {"constraint_regex": "(ab){40}"}
    before = spec_metrics(ours)
    constraints.generate(ours, prompts(1, seed=2), params(keys, max_tokens=60))
    after = spec_metrics(ours)
    drafted, accepted = (
        after[name] - before[name] for name in ("num_draft_tokens", "num_accepted_tokens")
    )
    assert accepted > 10
    assert drafted == accepted  # only one text is allowed, so whatever survives is right


def test_records_of_n_texts(engines: tuple[Any, Any]) -> None:
    for engine in engines:
        asked = params({**KINDS["regex"], "constraint_id": "three"}, n=3)
        output = engine.generate(prompts(1, seed=4), asked, use_tqdm=False)[0]
        records = constraints.results(engine, ["three", "unknown"])
        assert records["unknown"] == []
        drawn = sorted(record.token_ids for record in records["three"])
        assert drawn == sorted(list(sample.token_ids) for sample in output.outputs)
        assert len({tuple(tokens) for tokens in drawn}) > 1
        assert constraints.results(engine, ["three"])["three"] == []


def test_unseeded_requests_differ(engines: tuple[Any, Any]) -> None:
    # Of 200 such texts of 16 letters no two were equal: equal ones would mean equal noise.
    keys = {"constraint_regex": "[a-z]{22}"}
    same_prompt = prompts(1, seed=4) * 4
    for seed, different in ((None, 4), (5, 1)):
        asked = params(keys, seed=seed, temperature=2.0)
        samples = constraints.generate(engines[0], same_prompt, asked)
        assert len({tuple(sample.token_ids) for sample in samples}) == different


def test_a_failing_predicate_ends_its_request_only(engines: tuple[Any, Any]) -> None:
    for engine in engines:
        asked = [
            params({"constraint_predicate": "failing"}),
            params({"constraint_regex": "[0-9]{3}"}),
        ]
        failed, fine = constraints.generate(engine, prompts(2, seed=6), asked)
        assert failed.record.state == "error"
        assert "the database is gone" in failed.record.error
        assert failed.log_weight == -math.inf
        assert fine.record.state == "complete"
        assert len(fine.token_ids) == 3 + 1


def test_dead_ends_and_cut_texts_have_weight_zero(engines: tuple[Any, Any]) -> None:
    for engine in engines:
        cut = constraints.generate(
            engine, prompts(1, seed=8), params({"constraint_regex": "[a-z]{50}"}, max_tokens=5)
        )[0]
        assert (cut.record.state, cut.log_weight) == ("incomplete", -math.inf)
        narrow = params({"constraint_regex": "[^ -~]ab"}, top_k=1)
        dead = constraints.generate(engine, prompts(1, seed=8), narrow)[0]
        assert (dead.record.state, dead.log_weight) == ("dead_end", -math.inf)


@pytest.mark.parametrize(
    ("keys", "options", "parameter"),
    [
        ({"constraint_ebnf": "root ::= root"}, {}, "constraint_ebnf"),
        ({"constraint_ebnf": "root :: 1"}, {}, "line 1, column 6"),
        ({"constraint_json_schema": '{"type": "foo"}'}, {}, "constraint_json_schema"),
        ({"constraint_json_schema": "{"}, {}, "line 1 column"),
        ({"constraint_regex": "(a"}, {}, "constraint_regex"),
        ({"constraint_predicate": "odd"}, {}, "even"),
        ({"constraint_regx": "a"}, {}, "constraint_regx"),
        ({"constraint_regex": "a", "constraint_method": "cars"}, {"temperature": 0}, "temperature"),
        ({"constraint_regex": "a"}, {"presence_penalty": 1.0}, "presence_penalty"),
        ({"constraint_regex": "a"}, {"min_p": 0.1}, "min_p"),
        ({"constraint_regex": "a"}, {"ignore_eos": True}, "ignore_eos"),
    ],
)
def test_bad_requests_are_refused(
    engines: tuple[Any, Any], keys: dict[str, Any], options: dict[str, Any], parameter: str
) -> None:
    from vllm.exceptions import VLLMValidationError

    for engine in engines:
        with pytest.raises(VLLMValidationError) as refusal:
            engine.generate(prompts(1), params(keys, **options), use_tqdm=False)
        assert parameter in str(refusal.value)


def test_mirostat_and_momentum_with_and_without_trees(engines: tuple[Any, Any]) -> None:
    asked = [
        params({"mirostat_version": 1, "mirostat_tau": 2.0}),
        params({"mirostat_version": 2, "mirostat_tau": 2.0}),
        params({"momentum_alpha": 0.4}),
        params({}),
    ]
    requests = prompts(1, seed=12) * 4
    plain, ours = (
        [list(o.outputs[0].token_ids) for o in engine.generate(requests, asked, use_tqdm=False)]
        for engine in engines
    )
    assert plain == ours
    assert len({tuple(tokens) for tokens in plain}) == 4
