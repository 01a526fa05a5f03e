# SPDX-License-Identifier: Apache-2.0
import json
import time

import pytest
import xgrammar
from toy_model import BYTES, TINY

from logits_processors.constraint import ConstraintError, ConstraintRuntimeError
from logits_processors.limits import Limits
from logits_processors.productivity import generates_nothing
from logits_processors.xgrammar_constraint import compile_xgrammar


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("ebnf", 'root := "a"', "line 1, column 6"),
        ("ebnf", "root ::= foo", 'line 1, column 10: Rule "foo" is not defined'),
        ("regex", "(a", "at line 1, column 3: The parenthesis is not closed"),
        ("regex", "é\n(a", "at line 2, column 3: The parenthesis is not closed"),
        ("regex", "*a", "^regex: Expect element, but got"),
        ("regex", "a\nb\\q", "at line 2, column 2 is unknown"),
        ("regex", "a(?=b)", "Lookahead"),
        ("json_schema", "{", "not valid JSON.*line 1 column 2"),
        ("json_schema", '{"type": "foo"}', 'Unsupported type "foo"'),
        ("json_schema", "false", "cannot accept any value"),
        ("structural_tag", '{"type": "x"}', "structural_tag"),
        ("ebnf", "  ", "empty"),
        ("yaml", "a: b", "known: json_schema, ebnf, regex, structural_tag"),
    ],
)
def test_errors_name_the_place(kind, source, message):
    with pytest.raises(ConstraintError, match=message) as caught:
        compile_xgrammar(kind, source, BYTES)
    assert "/cpp/" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "root ::= root",
        'root ::= "a" root',
        'root ::= "a" b | b "c"\nb ::= "d" root',
        'root ::= b{2,3}\nb ::= "x" b',
    ],
)
def test_grammars_that_generate_nothing_are_refused(source):
    with pytest.raises(ConstraintError, match="no finite text"):
        compile_xgrammar("ebnf", source, BYTES)


@pytest.mark.parametrize(
    "source",
    [
        'root ::= "a" root | "b"',
        'root ::= "a" b | "c"\nb ::= "d" b',
        'root ::= b{0,3} "y"\nb ::= "x" b',
        'root ::= ("a" | "b" root)*',
        "root ::= [^a-z]",
    ],
)
def test_grammars_that_generate_something_are_not(source):
    compile_xgrammar("ebnf", source, BYTES)


def test_self_referring_schema_is_refused():
    with pytest.raises(ConstraintError, match="no finite text"):
        compile_xgrammar("json_schema", '{"$ref": "#"}', BYTES)


def test_unknown_grammar_layouts_are_given_the_benefit_of_the_doubt():
    dead = json.loads(xgrammar.Grammar.from_ebnf("root ::= root").serialize_json())
    assert generates_nothing(json.dumps(dead))
    assert not generates_nothing(json.dumps({**dead, "__VERSION__": "v999"}))


def test_a_language_without_spelling_is_refused():
    with pytest.raises(ConstraintError, match="no first token"):
        compile_xgrammar("ebnf", 'root ::= "abc"', TINY)


def test_steps_that_explode_end_the_request():
    rules = ['root ::= r0 "b"', *(f"r{i} ::= r{i + 1} | r{i + 1} r{i + 1}" for i in range(40))]
    source = "\n".join([*rules, 'r40 ::= "a" | ""'])
    constraint = compile_xgrammar("ebnf", source, BYTES, Limits(check_seconds=0.05)).start()

    def run():
        for _ in range(100):
            assert constraint.accept(ord("a"))
            constraint.mask()

    start = time.monotonic()
    with pytest.raises(ConstraintRuntimeError, match="check_seconds"):
        run()
    assert time.monotonic() - start < 20
    constraint.rollback(constraint.num_accepted)  # the state survives the refusal
    assert constraint.accept(ord("a"))


def test_limits_come_before_the_engine():
    with pytest.raises(ConstraintError, match="max_depth"):
        compile_xgrammar("ebnf", "root ::= " + "(" * 10**5 + '"a"' + ")" * 10**5, BYTES)
    with pytest.raises(ConstraintError, match="101 bytes given, at most 100"):
        compile_xgrammar("ebnf", "é" * 50 + "x", BYTES, Limits(max_bytes=100))
    with pytest.raises(ConstraintError, match="max_depth"):
        compile_xgrammar("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000, BYTES)
    with pytest.raises(ValueError, match=r"max_depth\s+Input should be greater than 0"):
        Limits(max_depth=0)


@pytest.mark.parametrize("source", [r"[\p{L}]+", r"\Aab", r"a\\\h"])
def test_escapes_that_would_be_taken_for_letters_are_refused(source):
    with pytest.raises(ConstraintError, match=r"is unknown to xgrammar, which would match"):
        compile_xgrammar("regex", source, BYTES)


@pytest.mark.parametrize(("source", "text"), [(r"\\p", b"\\p"), (r"\w\.\-", b"a.-"), ("p", b"p")])
def test_other_escapes_are_not(source, text):
    constraint = compile_xgrammar("regex", source, BYTES).start()
    assert all(constraint.accept(byte) for byte in text)
    assert constraint.complete()
