# SPDX-License-Identifier: Apache-2.0
"""What every engine must agree on: masks, token checks, rollback and the end of the text."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import BYTES, SetConstraint

from logits_processors.bitmask import unpack
from logits_processors.compilation import Spec, compile_constraint
from logits_processors.constraint import (
    CompiledConstraint,
    Constraint,
    place,
    refuse_if_empty,
    scan,
)
from logits_processors.predicate import compile_predicate
from logits_processors.vocabulary import Vocabulary

END = BYTES.eos_ids[0]
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"ab": {"type": "integer"}, "é": {"type": "boolean"}},
        "required": ["ab"],
    }
)
TAG = json.dumps(
    {
        "type": "structural_tag",
        "format": {
            "type": "tag",
            "begin": "<f>",
            "content": {"type": "json_schema", "json_schema": {"type": "integer"}},
            "end": "</f>",
        },
    }
)


class Balanced:
    """Balanced round brackets around letters."""

    def __init__(self, argument):
        self.letters = argument

    def prefix(self, text):
        depth = 0
        for char in text:
            depth += (char == "(") - (char == ")")
            if depth < 0 or char not in "()" + self.letters:
                return False
        return True

    def complete(self, text):
        return self.prefix(text) and text.count("(") == text.count(")")


CONSTRAINTS = {
    "ebnf": (
        Spec("ebnf", 'root ::= "ab" | "a" root "b" | "é"+'),
        ["ab", "aabb", "éé"],
        ["aab", "b"],
    ),
    "json_schema": (Spec("json_schema", SCHEMA), ['{"ab": 1}'], ["{}", '{"ab": "x"}', "[1]"]),
    "regex": (
        Spec("regex", "(ab|the )+[0-9]{2,3}"),
        ["abthe 12", "ab123"],
        ["ab1", "ab1234", "12"],
    ),
    "structural_tag": (Spec("structural_tag", TAG), ["<f>12</f>"], ["12", "<f>a</f>"]),
    "lark": (
        Spec("lark", 'start: "ab" | "a" start "b" | "é"+'),
        ["ab", "aabb", "éé"],
        ["aab", "b"],
    ),
    "regex_partial": (
        Spec("regex_partial", r"(?=.*\d)(a|b|é)\1+\d(?<!3)"),
        ["aa1", "bbb0", "éé2"],
        ["ab1", "a1", "aa3"],
    ),
    "json_validate": (
        Spec("json_validate", '{"type": "array", "uniqueItems": true, "not": {"const": []}}'),
        ["[1, 2]", '["ab"]'],
        ["[1, 1]", "[]", "{}"],
    ),
    "predicate": (("balanced", "abé"), ["(a)", "((é))b", ""], ["(", ")", "(c)"]),
}


@pytest.fixture(scope="module", params=CONSTRAINTS)
def case(request):
    spec, members, others = CONSTRAINTS[request.param]
    if request.param == "predicate":
        compiled = compile_predicate(spec[0], BYTES, spec[1], factory=Balanced)
    else:
        compiled = compile_constraint(spec, BYTES)
    return compiled, members, others


def bytewise(text):
    return list(text.encode())


def longest(text):
    """Spell with the longest tokens, so that multi-byte ones are met."""
    data, tokens = text.encode(), []
    while data:
        fit = max((t for t, _ in BYTES.by_bytes if data.startswith(t)), key=len)
        tokens.append(BYTES.text_tokens.index(fit))
        data = data[len(fit) :]
    return tokens


def feed(constraint, tokens):
    return all(constraint.accept(token) for token in tokens)


def snapshot(constraint):
    mask = unpack(constraint.full_mask(), BYTES.size)
    return mask.tolist(), constraint.complete(), constraint.num_accepted


def test_protocols(case):
    compiled, _, _ = case
    assert isinstance(compiled, CompiledConstraint)
    assert isinstance(compiled.start(), Constraint)
    assert compiled.vocabulary is BYTES


@pytest.mark.parametrize("spelling", [bytewise, longest])
def test_members_are_accepted_and_others_are_not(case, spelling):
    compiled, members, others = case
    for text in members:
        constraint = compiled.start()
        assert feed(constraint, spelling(text)), text
        assert constraint.complete(), text
        assert constraint.accept(END), text
    for text in others:
        constraint = compiled.start()
        assert not (feed(constraint, spelling(text)) and constraint.accept(END)), text


@pytest.mark.parametrize("spelling", [bytewise, longest])
def test_mask_and_checks_agree_along_members(case, spelling):
    compiled, members, _ = case
    for text in members:
        constraint = compiled.start()
        for token in [*spelling(text), END]:
            full = unpack(constraint.full_mask(), BYTES.size)
            checked = [constraint.allows(i) for i in range(BYTES.size)]
            assert full.tolist() == checked
            assert full.tolist() == unpack(scan(constraint, BYTES), BYTES.size).tolist()
            cheap = constraint.mask()
            assert cheap is None or unpack(cheap, BYTES.size).tolist() == checked
            assert full[END] == constraint.complete()
            assert constraint.accept(token)


def test_nothing_follows_the_end(case):
    compiled, members, _ = case
    constraint = compiled.start()
    assert feed(constraint, [*bytewise(members[0]), END])
    assert constraint.complete()
    assert not unpack(constraint.full_mask(), BYTES.size).any()
    assert not any(constraint.allows(i) for i in range(BYTES.size))
    assert not constraint.accept(END)
    constraint.rollback(1)
    assert constraint.complete()
    assert constraint.accept(END)


def test_ids_outside_the_text_vocabulary_are_refused(case):
    constraint = case[0].start()
    before = snapshot(constraint)
    for token in (-1, BYTES.size, 10**6, BYTES.size - 1):
        assert not constraint.allows(token)
        assert not constraint.accept(token)
    assert snapshot(constraint) == before


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_rollback_and_fork_restore_the_state(case, data):
    compiled, members, _ = case
    text = data.draw(st.sampled_from(members))
    tokens = [*data.draw(st.sampled_from([bytewise, longest]))(text), END]
    constraint = compiled.start()
    states = [snapshot(constraint)]
    for token in tokens:
        assert constraint.accept(token)
        constraint.accept(0)  # refused everywhere here, and must leave no trace
        states.append(snapshot(constraint))
    fork = constraint.fork()
    back = data.draw(st.integers(0, len(tokens)))
    constraint.rollback(back)
    assert snapshot(constraint) == states[len(tokens) - back]
    assert snapshot(fork) == states[-1]
    assert feed(constraint, tokens[len(tokens) - back :])
    assert snapshot(constraint) == states[-1]
    fork.reset()
    assert snapshot(fork) == states[0]
    with pytest.raises(ValueError, match=r"rollback\(1\)"):
        fork.rollback(1)
    with pytest.raises(ValueError, match=r"rollback\(-1\)"):
        fork.rollback(-1)


def test_states_are_independent(case):
    compiled, members, _ = case
    one, two = compiled.start(), compiled.start()
    fresh = snapshot(two)
    feed(one, bytewise(members[0]))
    assert snapshot(two) == fresh


def test_keys_tell_constraints_apart():
    keys = set()
    for name, (spec, _, _) in CONSTRAINTS.items():
        if name != "predicate":
            keys.add(compile_constraint(spec, BYTES).key)
            assert compile_constraint(spec, BYTES).key in keys
    keys |= {compile_predicate("p", BYTES, a, factory=Balanced).key for a in ("ab", "a")}
    assert len(keys) == len(CONSTRAINTS) + 1


def test_scan_skips_extensions_of_refused_tokens():
    constraint = SetConstraint([ord("x"), END], BYTES.size)
    assert np.flatnonzero(unpack(scan(constraint, BYTES), BYTES.size)).tolist() == [ord("x"), END]
    assert 256 not in constraint.asked  # "ab" begins with "a", which was refused


def test_scan_skips_nothing_else():
    vocabulary = Vocabulary((b"a", b"ab", b"abc", b"ac", b"", b"b"), eos_ids=(4,))
    for allowed in ([0, 3], [0, 1, 3], [0, 1, 2, 3, 5], [4], [5]):
        constraint = SetConstraint(allowed, vocabulary.size)
        assert np.flatnonzero(unpack(scan(constraint, vocabulary), 6)).tolist() == allowed


def test_empty_mask_is_refused():
    class Nothing:
        key, vocabulary = "", BYTES

        def start(self):
            return SetConstraint([], BYTES.size)

    with pytest.raises(ValueError, match="allows no first token"):
        refuse_if_empty(Nothing(), "nothing")


@pytest.mark.parametrize(
    ("source", "offset", "expected"),
    [
        ("abc", 0, "line 1, column 1"),
        ("abc", 3, "line 1, column 4"),
        ("a\nbc", 1, "line 1, column 2"),
        ("a\nbc", 2, "line 2, column 1"),
        ("\n\n", 2, "line 3, column 1"),
    ],
)
def test_a_place_in_a_text(source, offset, expected):
    assert place(source, offset) == expected
