# SPDX-License-Identifier: Apache-2.0
import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_model import BYTES

from logits_processors.constraint import ConstraintError
from logits_processors.lark_productivity import generates_nothing
from logits_processors.llguidance_constraint import compile_lark

EMPTY = [
    'start: "a" start',
    'start: "a" x\nx: "b" y | "c" x\ny: x "d"',
    'start: ("a" start)+',
    'start: start "b"',
    'start: "a" x{2,3}\nx: "b" x',
    'start: "a" x{2}\nx: "b" x',
    'start: "a" x~2\nx: "b" x',
    'start: "a" (x | y)\nx: "b" y\ny: "c" x',
    '?start: "a" x -> one\n  | "b" x -> two\nx: /c/ x // "d"\n',
    '%ignore /[ ]+/ | "\\t"\n%import common.INT\nstart: INT x\nx: "a".."z" x',
    'start: "a" T start\nT: /b/\n  | /c/\n',
    'start: "a" %json {"type": "object",\n "properties": {}} start',
    'start: "|" start | ")" start # | "a"',
    'start: /\\/|"/ start',
]
NOT_EMPTY = [
    'start: "a" start | "b"',
    'start: "a" start\n     | "b"',
    'start: "a" [start]',
    'start: "a" ("b" start)?',
    'start: "a" ("b" start)*',
    'start: "a" start |',
    'start: "a" x{0,3}\nx: "b" x',
    'start: "a" x{,3}\nx: "b" x',
    'start: "a" x\nx: "b" y | "c" x\ny: x "d" | "e"',
    "start: /[a-z]+/",
    'start: "a" X\nX: /b/ | "c"',
    'start: "a" %json {"type": "object"}',
    'start: "a" %regex {"substring_words": "b c"}',
    '%llguidance {"no_forcing": true}\nstart: "a"',
    '%import common.INT\nstart: "a" INT',
    'start: "a" | start "b"',
    'start: "a" x\nx: "b" x // comment\n | "c"',
    'start: x\nx[capture]: "a" | "b" x',
    'start: "a" -> one',
    'start: ""',
]


@pytest.mark.parametrize("source", EMPTY)
def test_grammars_without_a_text_are_refused(source):
    assert generates_nothing(source)
    with pytest.raises(ConstraintError, match="no finite text"):
        compile_lark(source, BYTES)


@pytest.mark.parametrize("source", NOT_EMPTY)
def test_grammars_with_a_text_are_not(source):
    assert not generates_nothing(source)
    compile_lark(source, BYTES)


@pytest.mark.parametrize(
    "source",
    [
        'start: "a" start | x{"b"}',
        'start.2: "a" start',
        'start::_ "a" start',
        'start: "a" start\nstart: "b" start',
        'start[capture]: "a" start',
        'x: "a" x',
        'start: "a" start ->',
        'start: "a" start %json',
        'start: "a" start %json {',
        "start: [",
        "start: \x00",
        "start: " + "(" * 5000 + '"a" start' + ")" * 5000,
        "",
    ],
)
def test_what_is_not_read_counts_as_productive(source):
    assert not generates_nothing(source)


def make_rules(seed):
    """Three rules: the alternatives of each, as lists of symbols."""
    random = Random(seed)
    symbols = ["start", "x", "y", '"a"']
    return {
        name: [
            random.choices(symbols, k=random.randint(0, 3)) if random.random() < 0.2
            else random.choices(symbols[:3], k=random.randint(1, 3))
            for _ in range(random.randint(1, 3))
        ]
        for name in symbols[:3]
    }  # fmt: skip


def shortest(rules, name, depth):
    """Whether ``name`` derives a string by a tree of at most ``depth`` levels."""
    return depth > 0 and any(
        all(part not in rules or shortest(rules, part, depth - 1) for part in alternative)
        for alternative in rules[name]
    )


def test_it_agrees_with_a_search_for_a_derivation():
    answers = set()
    for seed in range(500):
        rules = make_rules(seed)
        source = "\n".join(f"{n}: " + " | ".join(map(" ".join, b)) for n, b in rules.items())
        answers.add(generates_nothing(source))
        assert generates_nothing(source) == (not shortest(rules, "start", len(rules))), source
    assert answers == {True, False}


@given(st.text(alphabet='abstrt:|()[]{}+*?~,"/ \n->.%@<1#'))
def test_no_text_breaks_it(source):
    assert generates_nothing("start: " + source) in (True, False)


def test_long_chains_take_one_pass():
    rules = [f'r{i}: "a" r{i + 1}' for i in range(5000)]
    source = "\n".join(["start: r0", *rules, "r5000: r5000"])
    assert generates_nothing(source)
    assert not generates_nothing(re.sub("r5000: r5000", 'r5000: "b"', source))
