# SPDX-License-Identifier: Apache-2.0
"""Drafts drawn from a draft model and verified by ratio rules, through the whole engine.

Plain vLLM says what the law of the tokens is. The draft model is the target with noise on its
weights: right often enough that trees are accepted, wrong often enough that a rule which is not
exact shows. Requests are seeded, so the p-values are the same in every run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.loading import load_example
from tests.vllm_ext.engine import make_engine, make_tiny_model, prompts, texts
from tests.vllm_ext.test_engine import params

p_value = load_example("walk_law").p_value

pytestmark = pytest.mark.engine

RULES = ["swor", "kseq", "block"]
DRAWS = ["constant", "sequoia", "dyspec"]  # for swor, beside the default
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
    draft = make_noisy_copy(model, folder / "draft", 0.04)
    limits = {"max_num_batched_tokens": 1024, "max_num_seqs": 32}
    plain = make_engine(model, None, max_logprobs=-1, **limits)
    ours = make_engine(model, {**SPECULATIVE, "model": str(draft)}, **limits)
    yield plain, ours
    patch.undo()
    for engine in (plain, ours):
        engine.llm_engine.engine_core.shutdown()


@pytest.fixture(autouse=True)
def drafting_never_fails(engines: tuple[Any, Any]) -> Iterator[None]:
    """The counter is shared with engines of other modules, where drafting is made to fail."""

    def errors() -> float:
        return float(engines[1].collective_rpc("draft_state")[0]["drafting_errors"])

    before = errors()
    yield
    assert errors() == before


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


def drawn_trees(engine: Any) -> float:
    return float(engine.collective_rpc("draft_state")[0]["drawn_trees"])


def use(engine: Any, rule: str, broken: str = "none") -> None:
    engine.collective_rpc("set_rule", args=(rule, broken))
    engine.collective_rpc("watch_drafts")


@pytest.mark.parametrize("rule", RULES + DRAWS)
def test_law_is_the_targets(
    engines: tuple[Any, Any], joint: dict[tuple[int, ...], float], rule: str
) -> None:
    _, ours = engines
    use(ours, rule)
    given = answers(ours, COUNT)
    counts = ours.collective_rpc("watch_drafts")[0]
    # Both ends of the rules were at work: draws that were kept, and all draws of a node rejected.
    assert counts["trees"] >= COUNT
    assert counts["accepted"] > COUNT / 2
    assert counts["inside"] > COUNT / 10
    p = fit(given, joint)
    print(f"{rule}: {counts}, p = {p:.3g}")
    assert p > 1e-3


@pytest.mark.parametrize(
    ("rule", "broken"),
    [
        ("swor", "named"),
        ("kseq", "named"),
        ("block", "named"),
        ("swor", "law"),
        ("block", "law"),
        ("kseq", "stream"),
        ("swor", "order"),
        ("sequoia", "named"),
        ("dyspec", "order"),
    ],
)
def test_what_breaks_the_law_shows(
    engines: tuple[Any, Any], joint: dict[tuple[int, ...], float], rule: str, broken: str
) -> None:
    _, ours = engines
    use(ours, rule, broken)
    p = fit(answers(ours, COUNT // 2), joint)
    print(f"{rule}, {broken}: p = {p:.3g}")
    assert p < 1e-6


def test_a_seed_gives_the_same_answers_again(engines: tuple[Any, Any]) -> None:
    _, ours = engines
    for rule in RULES:
        use(ours, rule)
        first = answers(ours, 20, max_tokens=12)
        assert answers(ours, 20, max_tokens=12) == first
        assert len(set(first)) > 10


@pytest.mark.parametrize("rule", RULES)
def test_greedy_requests_keep_their_tokens(engines: tuple[Any, Any], rule: str) -> None:
    """Beside sampled ones in the same batch."""
    plain, ours = engines
    use(ours, rule)
    requests = prompts(10, seed=21)
    greedy = params(ignore_eos=True)
    mixed = [greedy, params(temperature=1.0, seed=2, ignore_eos=True)] * 5
    before = drawn_trees(ours)
    alone = texts(ours, requests, greedy)
    assert drawn_trees(ours) == before
    assert texts(ours, requests, mixed)[::2] == texts(plain, requests, greedy)[::2] == alone[::2]
    assert drawn_trees(ours) > before


@pytest.mark.parametrize("rule", RULES)
def test_a_grammar_cuts_drawn_drafts(engines: tuple[Any, Any], rule: str) -> None:
    """Most draws are forbidden here, and get no rows."""
    plain, ours = engines
    use(ours, rule)
    letters = list("aehimnorstuy")
    regex = {"regex": f"x[{''.join(letters)}]"}
    ids = ours.get_tokenizer().convert_tokens_to_ids(["x", *letters])
    asked = params(temperature=1.0, max_tokens=1, logprobs=-1)
    output = plain.generate([{"prompt_token_ids": [*PROMPT, ids[0]]}], asked, use_tqdm=False)[0]
    row = output.outputs[0].logprobs[0]
    weights = np.exp([row[token].logprob for token in ids[1:]])
    given = answers(ours, 400, structured_outputs=regex, top_k=0, ignore_eos=False)
    assert {answer[0] for answer in given} == {ids[0]}
    place = {token: i for i, token in enumerate(ids[1:])}
    counts = np.bincount([place[answer[1]] for answer in given], minlength=len(letters))
    assert p_value(counts, weights / weights.sum()) > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_logprobs_are_those_of_the_tokens(engines: tuple[Any, Any], rule: str) -> None:
    plain, ours = engines
    use(ours, rule)
    each = [params(**SAMPLED, seed=seed, logprobs=1) for seed in range(12)]
    outputs = ours.generate([{"prompt_token_ids": PROMPT}] * 12, each, use_tqdm=False)
    again = plain.generate(
        [{"prompt_token_ids": [*PROMPT, *output.outputs[0].token_ids]} for output in outputs],
        params(max_tokens=1, prompt_logprobs=0),
        use_tqdm=False,
    )
    for output, other in zip(outputs, again, strict=True):
        sample = output.outputs[0]
        for i, token in enumerate(sample.token_ids):
            expected = other.prompt_logprobs[len(PROMPT) + i][token].logprob
            assert sample.logprobs[i][token].logprob == pytest.approx(expected, abs=1e-3)


def test_min_tokens_is_not_forgotten_for_tokens_taken_back(
    engines: tuple[Any, Any], joint: dict[tuple[int, ...], float]
) -> None:
    _, ours = engines
    stops = sorted({answer[2] for answer in joint})
    least = LENGTH - 1

    def early() -> int:
        given = answers(ours, 200, min_tokens=least, stop_token_ids=stops, top_k=0)
        return sum(bool(set(answer[:least]) & set(stops)) for answer in given)

    use(ours, "block")
    assert early() == 0
    use(ours, "block", "text")
    assert early() > 0


def test_a_draft_that_is_the_target_is_always_kept(engines: tuple[Any, Any]) -> None:
    """Goes last: the engine's draft model is another one from here on."""
    _, ours = engines
    requests = prompts(8, seed=31)
    sampled = params(temperature=1.0, top_k=100, seed=6, ignore_eos=True)

    def lost(rule: str) -> float:
        use(ours, rule)
        texts(ours, requests, sampled)
        counts = ours.collective_rpc("watch_drafts")[0]
        assert counts["trees"] > 50
        return float(counts["inside"] / counts["trees"])

    before = [lost(rule) for rule in RULES]
    ours.collective_rpc("teach_draft")
    after = [lost(rule) for rule in RULES]
    print(f"trees left at an inner node: {before}, with the target's weights: {after}")
    assert min(before) > 0.1
    assert max(after) < 0.01
