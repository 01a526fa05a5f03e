# SPDX-License-Identifier: Apache-2.0
"""What the head learns from: answers that the target gives to prompts that it wrote itself.

A chat model that is given everything before a user's first word goes on as a user; what it asks
covers what it was trained to answer, with no data set at hand (the recipe of Magpie, arXiv
2406.08464). A model without a chat template writes texts from nothing. Prompts of the user's own
come first.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# Of answers 0, 1, 2, 3, ...: users ask for greedy answers and for varied ones.
TEMPERATURES = (1.0, 0.0, 1.0)
TOGETHER = 256
_LONGEST_QUESTION = 100
_LEAST_QUESTION = 3
_MARK = "@@question@@"


@dataclass(frozen=True, slots=True)
class Sample:
    """One text.

    Attributes:
        prompt: token ids, at least one.
        answer: token ids that the target drew.
        temperature: of the draws.
    """

    prompt: list[int]
    answer: list[int]
    temperature: float


@dataclass(frozen=True, slots=True)
class Template:
    """What stands around a user's words, as token ids; `after` is empty for a model of texts."""

    before: list[int]
    after: list[int]


def template_of(tokenizer: Any, anchor: int) -> Template:
    """The tokenizer's chat template, taken apart.

    Args:
        tokenizer: the target's (transformers).
        anchor: token that may begin a text, for a tokenizer without a chat template.
    """
    if not tokenizer.chat_template:
        return Template([anchor], [])
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
    )
    before, _, after = text.partition(_MARK)
    if not after:  # a template that changes what it is given
        return Template([anchor], [])
    ids = [list(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (before, after)]
    return Template(ids[0] or [anchor], ids[1])


def write(
    llm: Any,
    template: Template,
    prompts: Sequence[list[int]],
    longest: int,
    context: int,
    budget: float,
    advance: Callable[[float, str], None],
    clock: Callable[[], float] = time.monotonic,
) -> list[Sample]:
    """Let the target write for `budget` seconds; one round at least.

    Args:
        llm: vLLM's ``LLM``.
        template: around the questions that the target writes.
        prompts: of the user's own, ready to be answered; may be empty.
        longest: most tokens of an answer.
        context: most tokens of a prompt and its answer; longer prompts are left out.
        budget: seconds.
        advance: called after each part with its seconds and what it did.
        clock: seconds, from any beginning.
    """
    samples: list[Sample] = []
    heats = itertools.cycle(TEMPERATURES)
    room = context - longest
    own = _rounds([prompt for prompt in prompts if len(prompt) <= room])
    begin = last = clock()
    rounds = 0
    while rounds == 0 or (last - begin) * (1 + 0.5 / rounds) < budget:
        asked = next(own, None) or _questions(llm, template, room)
        samples += _answers(llm, asked, heats, longest)
        now = clock()
        advance(now - last, f"{sum(len(s.answer) for s in samples)} tokens")
        last = now
        rounds += 1
    random.Random(0).shuffle(samples)
    return samples


def _rounds(prompts: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    for first in range(0, len(prompts), TOGETHER):
        yield list(prompts[first : first + TOGETHER])


def _questions(llm: Any, template: Template, room: int) -> list[list[int]]:
    """Prompts that the target makes up, of at most `room` tokens."""
    most = min(_LONGEST_QUESTION, room - len(template.before) - len(template.after))
    if not template.after or most < _LEAST_QUESTION:
        return [[*template.before, *template.after]] * TOGETHER
    from vllm import SamplingParams

    end = template.after[0]
    params = SamplingParams(
        temperature=1.0, max_tokens=most, stop_token_ids=[end], detokenize=False
    )
    requests = [{"prompt_token_ids": template.before}] * TOGETHER
    found = []
    for output in llm.generate(requests, params, use_tqdm=False):
        question = [token for token in output.outputs[0].token_ids if token != end]
        if len(question) >= _LEAST_QUESTION:
            found.append([*template.before, *question, *template.after])
    return found or [[*template.before, *template.after]]


def _answers(
    llm: Any, prompts: Sequence[list[int]], heats: Iterator[float], longest: int
) -> list[Sample]:
    from vllm import SamplingParams

    # No seeds: vLLM on a CPU dies of seeded requests whose prompt is split between steps.
    wanted = [next(heats) for _ in prompts]
    params = [
        SamplingParams(temperature=heat, max_tokens=longest, detokenize=False) for heat in wanted
    ]
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(requests, params, use_tqdm=False)
    return [
        Sample(list(prompt), list(output.outputs[0].token_ids), heat)
        for prompt, heat, output in zip(prompts, wanted, outputs, strict=True)
    ]
