# SPDX-License-Identifier: Apache-2.0
import itertools
import time

import pytest
import regex
from toy_model import BYTES

from logits_processors.constraint import ConstraintError, ConstraintRuntimeError
from logits_processors.limits import Limits
from logits_processors.regex_constraint import RegexLanguage, compile_regex
from logits_processors.relaxation import without_look_around

PATTERNS = [
    r"(\w)(?=\1)(?<=(\w))\2{2}",
    r"(?!ab)a.*",
    r"a(?!b)[ab]c",
    r"(?=..b)a*b",
    r"(?<!a)b|ab",
    r"(a|b)\1",
    r"^(?>((?!c)\w)+)$",
    r"(?>a(?>b(?>c)))+",
    r"\ba+\b",
    r"a\Bb",
    r"(a)?b(?(1)c|a)",
    r"(?:a|ab)(?:c|bcd)?",
    r"(?!.*aa)[ab]{3}",
    r"(?=.*b)(?=.*c)[abc]{2,4}",
    r"(?!a$)\w+",
    r"(?!^ab$)\w{2}",
    r"(?!ab\b)\w+",
    r"(?<=a(?!\b))b|a(?!\b)b",
    r"a(?!.*a)b*",
    r"(?<![ab])c|b(?<!a)",
    r"\Aab\Z",
    r"(?!c+\Z)[abc]{1,3}",
]
TEXTS = ["".join(t) for n in range(6) for t in itertools.product("abc", repeat=n)]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_prefix_of_a_member_is_refused(pattern):
    language = RegexLanguage(pattern, 1.0)
    matcher = regex.compile(pattern)
    members = [text for text in TEXTS if matcher.fullmatch(text)]
    assert members
    for text in members:
        assert language.member(text)
        for end in range(len(text) + 1):
            assert language.viable(text[:end]), text[:end]
    assert not language.viable("!")
    assert sum(map(language.member, TEXTS)) == len(members)


def test_partial_matching_alone_would_refuse_a_viable_prefix():
    pattern = r"(?!a$)\w+"
    assert regex.fullmatch(pattern, "a", partial=True) is None
    assert RegexLanguage(pattern, 1.0).viable("a")
    assert not RegexLanguage(pattern, 1.0).member("a")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (r"(?=a)b", "(?:)b"),
        (r"(?!a(?:b))(?<=c)d", "(?:)(?:)d"),
        (r"\\(?=a)", r"\\(?:)"),
        (r"\(\?=a", r"\(\?=a"),
        (r"[(?=a)]+", "[(?=a)]+"),
        (r"[^]()]x(?=[)])", "[^]()]x(?:)"),
        (r"(?=(a))\1", None),
        (r"(?=(?<n>a))b", None),
        (r"(?(?=a)b|c)", None),
        (r"(?=a", None),
    ],
)
def test_look_around_is_taken_out(source, expected):
    assert without_look_around(source) == expected


def test_look_ahead_does_not_hide_the_rest():
    pattern = r"(?=.*[0-9])[a-z]+[0-9]"
    assert regex.fullmatch(pattern, "!!", partial=True) is not None
    assert not RegexLanguage(pattern, 1.0).viable("!!")
    assert RegexLanguage(pattern, 1.0).viable("ab")


def test_back_references_are_followed():
    constraint = compile_regex(r"(\w\w)-\1", BYTES).start()
    assert all(constraint.accept(ord(c)) for c in "xy-x")
    assert not constraint.allows(ord("x"))
    assert constraint.accept(ord("y"))
    assert constraint.complete()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a", "line 1, column 3"),
        ("a\nb[c", "line 2, column 4"),
        ("(?r)ab", "matches from the end"),
        ("", "empty"),
        ("(" * 300 + ")" * 300, "max_depth"),
        ("a" * 3000, "max_bytes"),
        ("(?!)", "empty text"),
    ],
)
def test_refusals(pattern, message):
    with pytest.raises(ConstraintError, match=message):
        compile_regex(pattern, BYTES, Limits(max_bytes=2000))


def test_catastrophic_backtracking_ends_in_time():
    constraint = compile_regex(r"(a|aa)+b\1", BYTES, Limits(check_seconds=0.2)).start()
    start = time.monotonic()

    def run():
        for _ in range(200):
            constraint.accept(ord("a"))
            constraint.complete()

    with pytest.raises(ConstraintRuntimeError, match="check_seconds"):
        run()
    assert time.monotonic() - start < 20
