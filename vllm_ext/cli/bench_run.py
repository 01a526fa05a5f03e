# SPDX-License-Identifier: Apache-2.0
"""Running a benchmark: all arms alive at once, taking turns on the same prompts.

Speed on a shared machine drifts by tens of percent within minutes, so arms that run one after the
other cannot be compared. Here every group of prompts is run on every arm before the next group,
and the arm that goes first changes from group to group. All processes of the arms whose turn it is
not are halted: after its last step a worker of vLLM polls for a second, on the core that the next
arm's worker is bound to, and would slow down every turn by a part of that second.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_ext.cli.engine_types import EngineError, GenerateResult
from vllm_ext.cli.prompts import EncodedPrompt, PromptFileError

WARM_UP_TEXT = "Name the days of the week, one per line, and say what people like about each."
WARM_UP_TOKENS = 32


class Engine(Protocol):
    """The part of `EngineProcess` that a benchmark uses."""

    def generate(
        self, prompts: Sequence[list[int]], params: Sequence[dict[str, Any]]
    ) -> GenerateResult:
        """Generate for all prompts in one batch."""

    def pause(self) -> None:
        """Take no processor time until `resume`."""

    def resume(self) -> None:
        """Be ready to generate again."""

    def restart(self) -> None:
        """Stop, halted or not, and start anew."""


@dataclass(frozen=True)
class Plan:
    """What is run: every group of each batch size, `rounds` times, on every arm.

    `fresh`: every batch size has prompts of its own, so that none is known to a drafter that has
    learnt from the other sizes.

    `restart`: every round has engines of its own. Two engines of one configuration differ by some
    percent as long as they live. Within one life of the engines that is part of every ratio, and no
    number of prompts averages it out.
    """

    batches: Sequence[int]
    rounds: int
    max_tokens: int
    temperature: float
    fresh: bool = False
    restart: bool = False

    def params(self, prompt: EncodedPrompt, round_index: int) -> dict[str, Any]:
        """Sampling parameters of a request: the same on every arm, another seed per round."""
        params: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        if self.temperature > 0:
            params["seed"] = 1 + prompt.index + 1_000_003 * round_index
        return params


@dataclass(frozen=True)
class Measurement:
    """One group of prompts on one arm in one round."""

    arm: str
    batch: int
    round: int
    group: int
    prompts: Sequence[EncodedPrompt]
    result: GenerateResult

    @property
    def seconds_per_token(self) -> float:
        """Wall time of the whole group per generated token."""
        return self.result.wall_s / self.result.num_tokens


def groups_of(prompts: Sequence[EncodedPrompt], batch: int) -> list[Sequence[EncodedPrompt]]:
    """Consecutive groups of `batch` prompts.

    A smaller last group would measure another batch size and is left out, unless it is the only
    one.
    """
    groups = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    if len(groups) > 1 and len(groups[-1]) < batch:
        groups.pop()
    return groups


def require_enough(num_prompts: int, plan: Plan) -> None:
    """Refuse a plan whose batch sizes would not all have a whole group of fresh prompts.

    Raises:
        PromptFileError: saying how many there are and how many it takes.
    """
    shares, largest = len(plan.batches), max(plan.batches)
    if plan.fresh and shares > 1 and num_prompts // shares < largest:
        raise PromptFileError(
            f"--fresh: {num_prompts} prompts among {shares} batch sizes are fewer than {largest} "
            "for each; give more prompts or smaller batches"
        )


def prompts_of(
    prompts: Sequence[EncodedPrompt], plan: Plan
) -> Iterator[tuple[int, list[Sequence[EncodedPrompt]]]]:
    """Each batch size with its groups of prompts; raises as `require_enough`."""
    require_enough(len(prompts), plan)
    shares = len(plan.batches) if plan.fresh else 1
    for index, batch in enumerate(plan.batches):
        # Every n-th prompt: files are sorted by task.
        yield batch, groups_of(prompts[index % shares :: shares], batch)


def count_measurements(prompts: Sequence[EncodedPrompt], plan: Plan, num_arms: int) -> int:
    """How many measurements `run` will yield."""
    return sum(len(groups) for _, groups in prompts_of(prompts, plan)) * plan.rounds * num_arms


def run(
    engines: Mapping[str, Engine],
    prompts: Sequence[EncodedPrompt],
    warm_up: list[int],
    plan: Plan,
    on_turn: Callable[[str], None] = lambda arm: None,
) -> Iterator[Measurement]:
    """Measure every group on every engine, yielding each measurement as it is made.

    `warm_up` (token ids) is run once at each batch size before anything is timed there; `on_turn`
    is told the arm whose turn it is.
    """
    names = list(engines)
    for engine in engines.values():
        engine.pause()
    for round_index in range(plan.rounds):
        anew = plan.restart and round_index > 0
        if anew:
            _start_anew(engines, on_turn)
        for batch, groups in prompts_of(prompts, plan):
            if anew or round_index == 0:
                _warm(engines, warm_up, batch)
            for group_index, group in enumerate(groups):
                first = (group_index + round_index) % len(names)
                for name in names[first:] + names[:first]:
                    on_turn(name)
                    token_ids = [prompt.token_ids for prompt in group]
                    params_of = [plan.params(prompt, round_index) for prompt in group]
                    with _awake(engines[name]) as engine:
                        result = engine.generate(token_ids, params_of)
                    yield Measurement(name, batch, round_index, group_index, group, result)


def _start_anew(engines: Mapping[str, Engine], on_turn: Callable[[str], None]) -> None:
    """One after the other, the rest halted: engines of this package measure when they start."""
    for name, engine in engines.items():
        on_turn(f"starting {name}")
        try:
            engine.restart()
        except EngineError as error:
            raise EngineError(f"arm {name!r} did not start anew: {error}") from error
        engine.pause()


def _warm(engines: Mapping[str, Engine], warm_up: list[int], batch: int) -> None:
    params = {"max_tokens": WARM_UP_TOKENS, "temperature": 0.0}
    for engine in engines.values():
        with _awake(engine):
            engine.generate([warm_up] * batch, [params] * batch)


@contextlib.contextmanager
def _awake(engine: Engine) -> Iterator[Engine]:
    engine.resume()
    try:
        yield engine
    finally:
        engine.pause()
