# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest

from vllm_ext.cli.bench_run import Plan, count_measurements, groups_of, run
from vllm_ext.cli.engine_types import EngineError
from vllm_ext.cli.prompts import EncodedPrompt, PromptFileError

PROMPTS = [EncodedPrompt(i, "t", [i]) for i in range(5)]


def test_groups_have_the_size_asked_for() -> None:
    assert [len(g) for g in groups_of(PROMPTS, 2)] == [2, 2]
    assert [len(g) for g in groups_of(PROMPTS, 5)] == [5]
    assert [len(g) for g in groups_of(PROMPTS, 8)] == [5]


def test_every_arm_gets_every_group_in_every_round_and_all_take_turns_going_first(
    FakeEngine: Any,
) -> None:
    engines = {"none": FakeEngine(), "a": FakeEngine(), "b": FakeEngine()}
    plan = Plan(batches=[2, 1], rounds=2, max_tokens=4, temperature=0.0)
    turns: list[str] = []
    measured = list(run(engines, PROMPTS, [9], plan, turns.append))
    assert len(measured) == count_measurements(PROMPTS, plan, 3) == (2 + 5) * 2 * 3
    assert turns == [m.arm for m in measured]
    cells = {(m.arm, m.batch, m.round, m.group) for m in measured}
    assert len(cells) == len(measured)
    firsts = [m.arm for m in measured[::3]]
    assert set(firsts) == {"none", "a", "b"}
    for i in range(0, len(measured), 3):  # the three arms of a group come together
        assert len({(m.batch, m.round, m.group) for m in measured[i : i + 3]}) == 1


def test_all_arms_rest_but_the_one_whose_turn_it_is(FakeEngine: Any, request_of: Any) -> None:
    engines: dict[str, Any] = {}
    awake: list[list[str]] = []

    def answer(ids: list[int], params: dict[str, Any]) -> Any:
        awake.append([name for name, engine in engines.items() if not engine.paused])
        return request_of([1, 2])

    engines.update({name: FakeEngine(answer) for name in ("none", "a")})
    plan = Plan(batches=[1], rounds=1, max_tokens=4, temperature=0.0)
    turns = [m.arm for m in run(engines, PROMPTS, [9], plan)]
    assert awake == [["none"], ["a"], *([turn] for turn in turns)]  # after the warm-up
    assert all(engine.paused for engine in engines.values())


@pytest.mark.parametrize("fresh", [False, True])
def test_fresh_prompts_are_seen_at_one_batch_size_only(fresh: bool, FakeEngine: Any) -> None:
    plan = Plan([1, 2], rounds=1, max_tokens=4, temperature=0.0, fresh=fresh)
    measured = list(run({"none": FakeEngine()}, PROMPTS, [9], plan))
    assert len(measured) == count_measurements(PROMPTS, plan, 1)
    seen = {b: {p.index for m in measured if m.batch == b for p in m.prompts} for b in (1, 2)}
    assert bool(seen[1] & seen[2]) != fresh
    assert seen[1] == ({0, 2, 4} if fresh else {0, 1, 2, 3, 4})


def test_too_few_fresh_prompts_are_refused() -> None:
    plan = Plan([1, 4], rounds=1, max_tokens=4, temperature=0.0, fresh=True)
    with pytest.raises(PromptFileError, match="5 prompts among 2 batch sizes"):
        count_measurements(PROMPTS, plan, 1)


def test_the_warm_up_is_not_measured_and_is_not_a_prompt(FakeEngine: Any) -> None:
    engine = FakeEngine()
    plan = Plan(batches=[1], rounds=1, max_tokens=4, temperature=0.0)
    measured = list(run({"none": engine}, PROMPTS, [99], plan))
    assert engine.calls[0][0] == [[99]]
    assert len(engine.calls) == len(measured) + 1


@pytest.mark.parametrize("restart", [False, True])
def test_further_rounds_may_have_engines_of_their_own(restart: bool, FakeEngine: Any) -> None:
    engines = {"none": FakeEngine(), "a": FakeEngine()}
    plan = Plan([1, 2], rounds=3, max_tokens=4, temperature=0.0, restart=restart)
    seen: list[tuple[int, int, int]] = []
    told: list[str] = []
    for m in run(engines, PROMPTS, [99], plan, told.append):
        others = [e for name, e in engines.items() if name != m.arm]
        assert all(e.paused for e in others)
        seen.append((m.round, engines["none"].restarts, engines["a"].restarts))
    lives = [0, 1, 2] if restart else [0, 0, 0]
    assert set(seen) == {(index, life, life) for index, life in enumerate(lives)}
    assert told.count("starting a") == (2 if restart else 0)
    warm_ups = sum(prompts[0] == [99] for prompts, _ in engines["a"].calls)
    assert warm_ups == (2 * 3 if restart else 2)  # at each batch size of each life


def test_an_arm_that_does_not_start_anew_is_named(
    FakeEngine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = {"none": FakeEngine(), "a": FakeEngine()}

    def broken() -> None:
        raise EngineError("no memory")

    monkeypatch.setattr(engines["a"], "restart", broken)
    plan = Plan([1], rounds=2, max_tokens=4, temperature=0.0, restart=True)
    with pytest.raises(EngineError, match="arm 'a' did not start anew: no memory"):
        list(run(engines, PROMPTS, [9], plan))


def test_sampled_requests_have_the_same_seed_on_every_arm_and_another_in_every_round() -> None:
    plan = Plan(batches=[1], rounds=2, max_tokens=4, temperature=1.0)
    seeds = {plan.params(p, r)["seed"] for p in PROMPTS for r in range(2)}
    assert len(seeds) == 10
    assert "seed" not in Plan([1], 1, 4, 0.0).params(PROMPTS[0], 0)
