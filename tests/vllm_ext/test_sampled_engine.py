# SPDX-License-Identifier: Apache-2.0
"""Drafts drawn from a draft model and verified by ratio rules, through the whole engine.

Plain vLLM says what the law of the tokens is. The draft model is the target with noise on its
weights: right often enough that trees are accepted, wrong often enough that a rule which is not
exact shows. Requests are seeded, so the p-values are the same in every run.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.vllm_ext.engine import make_engine, make_tiny_model, prompts, texts
from tests.vllm_ext.test_engine import params
from tests.vllm_ext.worker.test_walk import p_value

pytestmark = pytest.mark.engine

RULES = ["swor", "kseq", "block"]
PROMPT = prompts(1, seed=5, longest=12)[0]["prompt_token_ids"]
TOP, LENGTH = 3, 4  # tokens that may follow, and tokens of an answer
SAMPLED = {"temperature": 1.0, "top_k": TOP, "max_tokens": LENGTH, "ignore_eos": True}
COUNT = 1200
SPECULATIVE = {
    "method": "dyspec",
    "verify": "swor",
    "num_speculative_tokens": 4,
    "max_depth": 2,
    "adaptive": False,
    "sources": [],
}


def make_noisy_copy(model: Path, folder: Path, noise: float) -> Path:
    """The model with noise on its weights, relative to their size."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(3)
    copy = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for weights in copy.parameters():
            weights += noise * weights.std().nan_to_num() * torch.randn_like(weights)
    copy.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """Plain vLLM and ours, side by side."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    patch = pytest.MonkeyPatch()
    patch.setattr("vllm_ext.config.CPU_WORKER", "tests.vllm_ext.sampled_worker.SampledWorker")
    folder = tmp_path_factory.mktemp("models")
    model = make_tiny_model(folder / "target")
    draft = make_noisy_copy(model, folder / "draft", 0.15)
    limits = {"max_num_batched_tokens": 1024, "max_num_seqs": 32}
    plain = make_engine(model, None, max_logprobs=-1, **limits)
    ours = make_engine(model, {**SPECULATIVE, "model": str(draft)}, **limits)
    yield plain, ours
    patch.undo()
    for engine in (plain, ours):
        engine.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def joint(engines: tuple[Any, Any]) -> dict[tuple[int, ...], float]:
    """Probability of each answer, from plain vLLM's logprobs of each next token."""
    plain, _ = engines
    found: dict[tuple[int, ...], float] = {(): 1.0}
    asked = params(temperature=1.0, max_tokens=1, logprobs=TOP)
    for _ in range(LENGTH):
        paths = list(found)
        outputs = plain.generate(
            [{"prompt_token_ids": [*PROMPT, *path]} for path in paths], asked, use_tqdm=False
        )
        extended = {}
        for path, output in zip(paths, outputs, strict=True):
            rows = output.outputs[0].logprobs[0].items()
            ranked = sorted((row.rank, token, row.logprob) for token, row in rows)[:TOP]
            weights = np.exp([logprob for _, _, logprob in ranked])
            for (_, token, _), weight in zip(ranked, weights / weights.sum(), strict=True):
                extended[(*path, token)] = found[path] * float(weight)
        found = extended
    return found


def answers(engine: Any, count: int, **options: Any) -> list[tuple[int, ...]]:
    each = [params(**{**SAMPLED, **options}, seed=seed) for seed in range(count)]
    made = texts(engine, [{"prompt_token_ids": PROMPT}] * count, each)
    return [tuple(sample[0]) for sample in made]


def fit(given: Sequence[tuple[int, ...]], joint: dict[tuple[int, ...], float]) -> float:
    """The p-value of a sample of answers."""
    assert set(given) <= set(joint)
    place = {answer: i for i, answer in enumerate(joint)}
    counts = np.bincount([place[answer] for answer in given], minlength=len(joint))
    return p_value(counts, np.array(list(joint.values())))


@pytest.mark.parametrize("rule", RULES)
def test_law_is_the_targets(
    engines: tuple[Any, Any], joint: dict[tuple[int, ...], float], rule: str
) -> None:
    _, ours = engines
    ours.collective_rpc("set_rule", args=(rule,))
    ours.collective_rpc("watch_drafts")
    given = answers(ours, COUNT)
    counts = ours.collective_rpc("watch_drafts")[0]
    print(rule, counts, fit(given, joint))
    assert counts["trees"] >= COUNT
    assert 0.3 * counts["trees"] < counts["inside"] or rule == "x"
    assert fit(given, joint) > 1e-3


@pytest.mark.parametrize(
    ("rule", "broken"),
    [*itertools.product(RULES, ["named", "stream", "law"]), ("swor", "order")],
)
def test_a_broken_pair_of_drawing_and_verifying_shows(
    engines: tuple[Any, Any], joint: dict[tuple[int, ...], float], rule: str, broken: str
) -> None:
    _, ours = engines
    ours.collective_rpc("set_rule", args=(rule, broken))
    p = fit(answers(ours, 600), joint)
    print(rule, broken, p)
    assert p < 1e-6
