# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest

from vllm_ext.cli.arms import Arm
from vllm_ext.cli.compare import TIE_GAP
from vllm_ext.cli.engine_types import EngineDiedError, EngineError
from vllm_ext.cli.presets import parse_presets
from vllm_ext.cli.prompts import EncodedPrompt
from vllm_ext.cli.verify import judge
from vllm_ext.cli.verify_run import Answers, answer, report, top2_gap

PROMPTS = [EncodedPrompt(i, "t", [100 + i]) for i in range(5)]
METHOD = Arm("dyspec", {"method": "dyspec"})


@pytest.fixture
def honest(request_of: Any) -> Any:
    """An answer that depends on the prompt and on the seed, and on nothing else."""
    return lambda ids, params: request_of([ids[0], params.get("seed", 0), 7])


def judged(
    reference: Answers, other: Answers, *, gap: float = 1.0, excuse_ties: bool = True
) -> dict[str, Any]:
    cells = report(reference, other, PROMPTS, lambda ids: gap)
    return judge(METHOD, cells, excuse_ties=excuse_ties)


def ask(engine: Any, sampling: str = "greedy,seeded") -> Answers:
    return answer(engine, PROMPTS, parse_presets(sampling), [1, 2], max_tokens=3)


def test_every_preset_and_batch_size_is_asked(FakeEngine: Any, honest: Any) -> None:
    engine = FakeEngine(honest)
    done: list[tuple[int, str]] = []
    presets = parse_presets("greedy,seeded")
    answers = answer(engine, PROMPTS, presets, [1, 2], 3, lambda n, name: done.append((n, name)))
    assert set(answers.requests) == {(s, b) for s in ("greedy", "seeded") for b in (1, 2)}
    assert all(len(requests) == 5 for requests in answers.requests.values())
    # One at a time at batch 1; all at once at the largest, where the engine holds the limit.
    assert [len(prompts) for prompts, _ in engine.calls] == [1] * 5 + [5] + [1] * 5 + [5]
    assert sum(n for n, _ in done) == 20


def test_the_same_answers_pass(FakeEngine: Any, honest: Any) -> None:
    result = judged(ask(FakeEngine(honest)), ask(FakeEngine(honest, drafted=3)))
    assert result == {"method": "dyspec", "passed": True, "problems": []}


def test_drafts_are_counted_per_cell(FakeEngine: Any, honest: Any) -> None:
    engine = FakeEngine(honest, drafted=3, accepted=2)
    cells = report(ask(FakeEngine(honest)), ask(engine), PROMPTS, lambda ids: 1.0)
    # Five calls at batch 1, one at the largest batch.
    assert [(c.draft_tokens, c.accepted_tokens) for c in cells] == [(15, 10), (3, 2)] * 2


def test_one_wrong_token_on_one_prompt_fails(FakeEngine: Any, honest: Any, request_of: Any) -> None:
    def wrong_once(ids: list[int], params: dict[str, Any]) -> Any:
        return request_of([103, 0, 8]) if ids == [103] else honest(ids, params)

    reference, other = ask(FakeEngine(honest)), ask(FakeEngine(wrong_once, drafted=3))
    assert not judged(reference, other)["passed"]
    (found,) = report(reference, other, PROMPTS, lambda ids: 0.25)[0].mismatches
    assert (found.prompt, found.position, found.reference_token, found.token) == (3, 2, 7, 8)
    assert found.gap == 0.25


def test_ties_are_excused_in_float32_only(FakeEngine: Any, honest: Any, request_of: Any) -> None:
    other_choice = FakeEngine(lambda ids, params: request_of([ids[0], 0, 8]), drafted=3)
    reference, other = ask(FakeEngine(honest), "greedy"), ask(other_choice, "greedy")
    assert judged(reference, other, gap=TIE_GAP / 2)["passed"]
    assert not judged(reference, other, gap=TIE_GAP * 2)["passed"]
    assert not judged(reference, other, gap=TIE_GAP / 2, excuse_ties=False)["passed"]


def test_the_gap_is_asked_for_after_the_prompt_and_the_common_prefix(
    FakeEngine: Any, honest: Any, request_of: Any
) -> None:
    asked: list[list[int]] = []

    def gap_at(ids: list[int]) -> float:
        asked.append(ids)
        return 1.0

    wrong = FakeEngine(lambda ids, params: request_of([ids[0], 0, 8]))
    report(ask(FakeEngine(honest), "greedy"), ask(wrong, "greedy"), PROMPTS[:5], gap_at)
    assert asked[:2] == [[100, 100, 0], [101, 101, 0]]


def test_no_draft_at_all_proves_nothing(FakeEngine: Any, honest: Any) -> None:
    result = judged(ask(FakeEngine(honest)), ask(FakeEngine(honest)))
    assert not result["passed"]
    assert "proves nothing" in result["problems"][0]


def test_a_refused_request_fails_and_names_the_reason(FakeEngine: Any, honest: Any) -> None:
    def refuses_seeds(ids: list[int], params: dict[str, Any]) -> Any:
        if "seed" in params:
            raise EngineError("seeds are not supported")
        return honest(ids, params)

    engine = FakeEngine(refuses_seeds, drafted=3)
    result = judged(ask(FakeEngine(honest)), ask(engine))
    assert not result["passed"]
    assert result["problems"][0] == ("seeded at batch 1: refused (method: seeds are not supported)")
    assert engine.restarts == 0


def test_a_crashed_engine_is_restarted_for_the_rest(FakeEngine: Any, honest: Any) -> None:
    def crashes_once(ids: list[int], params: dict[str, Any]) -> Any:
        if not engine.restarts:
            raise EngineDiedError("dead")
        return honest(ids, params)

    engine = FakeEngine(crashes_once)
    answers = ask(engine)
    assert engine.restarts == 1
    assert answers.refused == {("greedy", 1): "dead"}
    assert set(answers.requests) == {("greedy", 2), ("seeded", 1), ("seeded", 2)}


def test_gap_is_between_the_two_best(FakeEngine: Any, request_of: Any) -> None:
    engine = FakeEngine(lambda ids, params: request_of([4], logprobs=[{4: -0.1, 5: -2.6, 6: -9.0}]))
    assert top2_gap(engine, [1, 2]) == pytest.approx(2.5)
    assert engine.calls == [([[1, 2]], [{"max_tokens": 1, "temperature": 0.0, "logprobs": 2}])]
