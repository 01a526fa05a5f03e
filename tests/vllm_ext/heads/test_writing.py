# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.vllm_ext.engine import make_tiny_model
from tests.vllm_ext.heads.clock import ticking
from vllm_ext.heads.writing import TEMPERATURES, TOGETHER, Template, template_of, write

pytest.importorskip("vllm")

END, ANSWER = 9, 77


class FakeLLM:
    """Asks what has three tokens and an end, or only an end; answers with `ANSWER`."""

    def __init__(self, question: list[int]) -> None:
        self.question = question
        self.asked: list[list[int]] = []
        self.heats: list[float] = []

    def generate(self, requests: list[dict[str, Any]], params: Any, use_tqdm: bool) -> list[Any]:
        if not isinstance(params, list):  # one for all: questions
            assert params.stop_token_ids == [END]
            said = self.question
        else:
            self.asked += [request["prompt_token_ids"] for request in requests]
            self.heats += [one.temperature for one in params]
            assert all(one.max_tokens == 5 and one.seed is None for one in params)
            said = [ANSWER]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=said)]) for _ in requests]


def nothing(seconds: float, doing: str) -> None:
    pass


def test_the_target_makes_up_its_prompts_and_answers_them() -> None:
    llm = FakeLLM([4, 5, 6, END])
    samples = write(llm, Template([1, 2], [END, 3]), [], 5, 99, 0.0, nothing, ticking(1.0))
    assert len(samples) == TOGETHER  # one round, however little time there is
    assert {tuple(sample.prompt) for sample in samples} == {(1, 2, 4, 5, 6, END, 3)}
    assert all(sample.answer == [ANSWER] for sample in samples)
    assert llm.heats[:3] == list(TEMPERATURES)
    assert sorted(sample.temperature for sample in samples) == sorted(llm.heats)


def test_questions_of_no_words_are_not_asked() -> None:
    llm = FakeLLM([END])
    write(llm, Template([1], [END, 3]), [], 5, 99, 0.0, nothing, ticking(1.0))
    assert llm.asked == [[1, END, 3]]


def test_the_users_prompts_come_first_and_each_once() -> None:
    llm = FakeLLM([4, 5, 6])
    own = [[20, i] for i in range(TOGETHER + 1)]
    samples = write(llm, Template([1], [END]), own, 5, 99, 3.0, nothing, ticking(1.0))
    assert llm.asked[: len(own)] == own
    assert llm.asked[len(own)] == [1, 4, 5, 6, END]  # then its own
    assert len(samples) == len(llm.asked)


def test_texts_fit_into_the_context() -> None:
    llm = FakeLLM([4, 5, 6])
    own = [[20] * 9, [20] * 10, [20] * 11]
    write(llm, Template([1], [END]), own, 5, 15, 0.0, nothing, ticking(1.0))
    assert llm.asked == own[:2]
    llm.asked = []
    write(llm, Template([1], [END]), [], 5, 9, 0.0, nothing, ticking(1.0))  # no room for words
    assert llm.asked == [[1, END]] * TOGETHER


def test_a_model_of_texts_writes_from_nothing() -> None:
    llm = FakeLLM([])
    write(llm, Template([1], []), [], 5, 99, 0.0, nothing, ticking(1.0))
    assert llm.asked == [[1]] * TOGETHER


def test_writing_ends_near_the_budget() -> None:
    seconds: list[float] = []
    llm = FakeLLM([4, 5, 6])
    write(
        llm,
        Template([1], [END]),
        [],
        5,
        99,
        10.0,
        lambda taken, doing: seconds.append(taken),
        ticking(3.0),
    )
    assert sum(seconds) == pytest.approx(10, abs=3 / 2)


def test_chat_templates_are_taken_apart(tmp_path: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_tiny_model(tmp_path))

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    tokenizer.chat_template = "<s>U:{{ messages[0]['content'] }}\nA:"
    assert template_of(tokenizer, 0) == Template([0, *ids("U:")], ids("\nA:"))
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    assert template_of(tokenizer, 7) == Template([7], ids("!"))
    for absent in (None, "nothing of it", "{{ messages[0]['content'] | upper }}"):
        tokenizer.chat_template = absent
        assert template_of(tokenizer, 7) == Template([7], [])
