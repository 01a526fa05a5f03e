# SPDX-License-Identifier: Apache-2.0
import json
import time

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import BYTES

from logits_processors.bitmask import unpack
from logits_processors.constraint import ConstraintError, ConstraintRuntimeError
from logits_processors.json_closing import finishing_tokens, open_brackets
from logits_processors.json_validate import compile_json_validate
from logits_processors.limits import Limits
from logits_processors.vocabulary import Vocabulary

END = BYTES.eos_ids[0]
CASES = [
    ({"not": {"type": "string"}}, [1, None, [], {}, "a"]),
    ({"type": "array", "uniqueItems": True}, [[], [1, 2], [1, 1], [{"a": 1}, {"a": 1}], 3]),
    ({"contains": {"minimum": 5}, "minContains": 2, "type": "array"}, [[5, 6], [5], [1, 2, 9, 9]]),
    (
        {
            "properties": {"a": {"type": "integer"}},
            "patternProperties": {"^x_": {"type": "string"}},
            "additionalProperties": {"type": "null"},
        },
        [{}, {"a": 1}, {"a": "1"}, {"x_y": "s"}, {"x_y": 1}, {"z": None}, {"z": 0}, 5],
    ),
    ({"patternProperties": {"x": True}, "additionalProperties": False}, [{"axb": 1}, {"y": 1}]),
    ({"pattern": "^a+$"}, ["aaa", "ab", 5]),
    ({"dependentSchemas": {"a": {"required": ["b"]}}}, [{"a": 1}, {"a": 1, "b": 2}, {"b": 1}]),
    ({"if": {"type": "integer"}, "then": {"multipleOf": 3}, "else": False}, [3, 4, "a"]),
    ({"$ref": "#/$defs/t", "$defs": {"t": {"const": {"a": [1.5]}}}}, [{"a": [1.5]}, {"a": [1]}]),
    (
        {"type": "object", "unevaluatedProperties": False, "properties": {"a": True}},
        [{"a": 1}, {"b": 1}],
    ),
]


@pytest.mark.parametrize(("schema", "values"), CASES)
def test_a_text_may_end_exactly_where_the_validator_agrees(schema, values):
    compiled = compile_json_validate(json.dumps(schema), BYTES)
    reference = jsonschema.Draft202012Validator(schema)
    verdicts = []
    for value in values:
        constraint = compiled.start()
        taken = all(constraint.accept(byte) for byte in json.dumps(value).encode())
        assert (taken and constraint.accept(END)) == reference.is_valid(value), value
        verdicts.append(reference.is_valid(value))
    assert len(set(verdicts)) == 2


def test_the_verdict_follows_a_rollback():
    constraint = compile_json_validate('{"uniqueItems": true}', BYTES).start()
    assert all(constraint.accept(byte) for byte in b"[1,1")
    assert not constraint.accept(ord("]"))
    constraint.rollback(1)
    assert all(constraint.accept(byte) for byte in b"2]")
    assert constraint.complete()
    constraint.rollback(2)
    assert all(constraint.accept(byte) for byte in b"1")
    assert not constraint.accept(ord("]"))


def test_a_value_that_breaks_the_schema_is_not_finished():
    """Closing it would leave nothing but white space; an object may still get what it lacks."""
    constraint = compile_json_validate('{"required": ["a"]}', BYTES).start()
    assert constraint.accept(ord("{"))
    assert not constraint.allows(ord("}"))
    assert not constraint.accept(ord("}"))
    assert constraint.num_accepted == 1
    assert all(constraint.accept(byte) for byte in b'"a": {}')
    assert constraint.accept(ord("}"))
    assert constraint.accept(END)


def test_a_number_may_go_on_where_it_is_not_yet_valid():
    constraint = compile_json_validate('{"minimum": 10, "type": "integer"}', BYTES).start()
    assert constraint.accept(ord("1"))
    assert not constraint.allows(END)
    assert constraint.accept(ord("2"))
    assert constraint.accept(END)


WORDS = (
    [bytes([byte]) for byte in range(128)]
    + [b"", b'"}', b"}}", b"]}", b"}]", b'": [', b"},", b"} \n", b"null", b"true}", b"12 ", b" "]
    + [b"[]", b"{}", b'{"a', b'""', b'"]}', b" ]", b"\\u0041", b"}}}", b"1}"]
    + [b"tr", b"ue", b" nul", b"l", b" false", b"\ntrue", b"le", b"fals", b"e}", b"able"]
)
MANY = Vocabulary(tuple(WORDS), (128,))
SCHEMA = '{"required": ["a"], "properties": {"a": {"uniqueItems": true}}, "not": {"minimum": 3}}'


SCHEMAS = [SCHEMA, '{"enum": [null, "a", [false]]}', '{"type": "object", "maxProperties": 1}']


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(SCHEMAS), st.lists(st.integers(0, 2**16), max_size=14))
def test_the_mask_is_what_the_checks_say(schema, choices):
    constraint = compile_json_validate(schema, MANY).start()
    interesting = [i for i, word in enumerate(WORDS) if set(word) & set(b'{}[]"a:,1 ntrule')]
    for choice in choices:
        allowed = unpack(constraint.mask(), MANY.size)
        assert allowed.tolist() == [constraint.allows(token) for token in range(MANY.size)]
        possible = [token for token in interesting if allowed[token]]
        if not possible:
            return
        assert constraint.accept(possible[choice % len(possible)])


def test_a_depth_counts_no_brackets_in_strings():
    assert open_brackets(b'{"a]}": [1, {"b\\"}": "') == 3
    assert open_brackets(b'{"a": "\\') == 1
    assert open_brackets(b'[[], {"x": "["}') == 1


def test_few_tokens_can_finish_a_text():
    """Each is tried with every mask: words that end like a literal must not be among them."""
    finishing = finishing_tokens(MANY)

    def at(depth):
        return {WORDS[token] for token in finishing.at(depth).tolist()}

    assert {b"ue", b"l", b" false", b"\ntrue", b"null", b'"', b"}", b"]}"} <= at(0)
    assert not {b"le", b"able", b"fals", b" nul", b"a", b"1", b" "} & at(0)
    assert {b"}", b"]}", b"}}"} <= at(1)
    assert not {b"ue", b"null", b'"'} & at(1)
    assert at(3) == {b"}}}"}


@pytest.mark.parametrize(
    ("schema", "begins", "does_not"),
    [
        ('{"type": "object"}', "{", '["1tn-'),
        ('{"type": "array", "minItems": 1}', "[", '{"1tn-'),
        ('{"type": "string"}', '"', "{[1tn-"),
        ('{"type": "integer"}', '1-{["tn', "}"),
        ('{"type": ["object", "null"]}', '{["1tn-', "}"),
        # In this draft a reference stands alone.
        (
            '{"$schema": "http://json-schema.org/draft-07/schema#", "$ref": "#/definitions/x", '
            '"type": "object", "definitions": {"x": {}}}',
            '{["1tn-',
            "}",
        ),
    ],
)
def test_a_text_of_the_wrong_kind_is_not_begun(schema, begins, does_not):
    constraint = compile_json_validate(schema, BYTES).start()
    assert all(constraint.allows(ord(first)) for first in begins)
    assert not any(constraint.allows(ord(first)) for first in does_not)


def test_text_that_is_not_json_is_refused_on_the_way():
    constraint = compile_json_validate("{}", BYTES).start()
    assert all(constraint.accept(byte) for byte in b'{"a": [1')
    assert not constraint.allows(ord("}"))
    assert not constraint.complete()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "an object or a boolean, given list"),
        ("false", "satisfied by nothing"),
        ('{"type": "foo"}', r"\$.type"),
        ('{"pattern": "("}', r"pattern"),
        ('{"patternProperties": {"(": {}}}', r"patternProperties|pattern '\('"),
        ('{"patternProperties": {"a": {}}, "unevaluatedProperties": false}', "not supported"),
        ('{"items":' * 5000 + "{}" + "}" * 5000, "max_depth"),
    ],
)
def test_refusals(source, message):
    with pytest.raises(ConstraintError, match=message):
        compile_json_validate(source, BYTES)


def test_references_are_never_fetched():
    constraint = compile_json_validate('{"$ref": "http://localhost:9/x.json"}', BYTES).start()
    assert constraint.accept(ord("1"))
    with pytest.raises(ConstraintRuntimeError, match="unresolvable reference"):
        constraint.complete()
    constraint.reset()
    assert constraint.accept(ord("["))
    with pytest.raises(ConstraintRuntimeError, match="unresolvable reference"):
        constraint.accept(ord("]"))
    assert constraint.num_accepted == 1


def test_endless_reference_refuses_instead_of_recursing():
    constraint = compile_json_validate('{"$ref": "#"}', BYTES).start()
    assert constraint.accept(ord("1"))
    assert not constraint.complete()


def test_catastrophic_pattern_ends_in_time():
    compiled = compile_json_validate(
        r'{"pattern": "^(a|aa)+b\\1$"}', BYTES, Limits(check_seconds=0.2)
    )
    constraint = compiled.start()
    assert all(constraint.accept(byte) for byte in json.dumps("a" * 80).encode()[:-1])
    start = time.monotonic()
    with pytest.raises(ConstraintRuntimeError, match="check_seconds"):
        constraint.accept(ord('"'))
    assert time.monotonic() - start < 5


def test_patterns_are_read_by_the_engine_that_runs_them():
    constraint = compile_json_validate(r'{"pattern": "^\\p{Letter}+$"}', BYTES).start()
    assert all(constraint.accept(byte) for byte in b'"ab1')
    assert not constraint.accept(ord('"'))


def test_huge_integers_do_not_stop_the_engine():
    constraint = compile_json_validate('{"multipleOf": 3}', BYTES).start()
    assert all(constraint.accept(byte) for byte in b"3" * 5000)
    start = time.monotonic()
    assert not constraint.complete()
    assert time.monotonic() - start < 1
