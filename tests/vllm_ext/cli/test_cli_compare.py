# SPDX-License-Identifier: Apache-2.0
import dataclasses
from typing import Any

from vllm_ext.cli.compare import TIE_GAP, Mismatch, compare, verdict

WHERE: dict[str, Any] = {"sampling": "greedy", "batch": 1, "prompt": 5}


def test_identical_answers(request_of: Any) -> None:
    assert compare(request_of([1, 2, 3]), request_of([1, 2, 3]), **WHERE) == []


def test_a_single_changed_token_is_found_where_it_is(request_of: Any) -> None:
    (found,) = compare(request_of([1, 2, 3, 4]), request_of([1, 2, 9, 4]), **WHERE)
    assert (found.kind, found.position, found.reference_token, found.token) == ("token", 2, 3, 9)
    assert (found.sampling, found.batch, found.prompt, found.sequence) == ("greedy", 1, 5, 0)


def test_a_shorter_answer_is_a_difference(request_of: Any) -> None:
    (found,) = compare(request_of([1, 2, 3]), request_of([1, 2]), **WHERE)
    assert (found.kind, found.position, found.reference_token, found.token) == (
        "length",
        2,
        3,
        None,
    )


def test_the_same_tokens_with_another_text_or_finish_reason_differ(request_of: Any) -> None:
    reference = request_of([1], text="a.", finish="stop")
    for other in (request_of([1], text="a", finish="stop"), request_of([1], text="a.")):
        assert [m.kind for m in compare(reference, other, **WHERE)] == ["finish"]


def test_each_of_n_sequences_is_compared(request_of: Any) -> None:
    found = compare(request_of([1, 2], [3, 4]), request_of([1, 2], [3, 5]), **WHERE)
    assert [(m.sequence, m.position) for m in found] == [(1, 1)]
    assert [m.kind for m in compare(request_of([1], [1]), request_of([1]), **WHERE)] == ["count"]


def test_logprobs_may_differ_by_rounding_only(request_of: Any) -> None:
    reference = request_of([1, 2], logprobs=[{1: -0.5}, {2: -1.0, 7: -2.0}])
    rounded = request_of([1, 2], logprobs=[{1: -0.5004}, {2: -1.0, 8: -2.0}])
    wrong = request_of([1, 2], logprobs=[{1: -0.5}, {2: -1.01, 7: -2.0}])
    missing = request_of([1, 2])
    assert compare(reference, rounded, **WHERE) == []
    for other, position in ((wrong, 1), (missing, 0)):
        (found,) = compare(reference, other, **WHERE)
        assert (found.kind, found.position) == ("logprob", position)


def test_prompt_logprobs_are_compared(request_of: Any) -> None:
    reference = request_of([1], prompt_logprobs=[{}, {4: -1.0}])
    same = request_of([1], prompt_logprobs=[{}, {4: -1.0}])
    wrong = request_of([1], prompt_logprobs=[{}, {4: -1.5}])
    assert compare(reference, same, **WHERE) == []
    (found,) = compare(reference, wrong, **WHERE)
    assert (found.kind, found.position) == ("prompt_logprob", 1)


def test_only_a_choice_between_equal_tokens_is_a_tie() -> None:
    token = Mismatch("greedy", 1, 0, 0, 3, 10, 11, "token", gap=TIE_GAP / 2)
    assert token.is_tie()
    assert not dataclasses.replace(token, gap=TIE_GAP * 2).is_tie()
    assert not dataclasses.replace(token, gap=None).is_tie()
    assert not dataclasses.replace(token, kind="length").is_tie()
    assert token.as_dict()["tie"] is True


def test_verdict_excuses_ties_and_nothing_else() -> None:
    tie = Mismatch("greedy", 1, 0, 0, 3, 10, 11, "token", gap=TIE_GAP / 2)
    real = dataclasses.replace(tie, gap=0.3)
    assert verdict([], excuse_ties=False)
    assert verdict([tie], excuse_ties=True)
    assert not verdict([tie], excuse_ties=False)
    assert not verdict([tie, real], excuse_ties=True)
