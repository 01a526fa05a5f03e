# SPDX-License-Identifier: Apache-2.0
import time

import pytest
from toy_model import BYTES

from logits_processors.constraint import ConstraintError, ConstraintRuntimeError
from logits_processors.llguidance_constraint import compile_lark


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("start: foo", 'line 1, column 8: unknown name: "foo"'),
        ('start: "a" ||| 1', r"line 1, column 1\d: "),
        ("start: /a(?=b)/", "look-around"),
        ("start: start", "lark"),
        (r"start: /[^\s\S]/", "lark"),
        ("start: " + "(" * 10**5 + '"a"' + ")" * 10**5, "max_depth"),
        ("", "empty"),
    ],
)
def test_refusals(source, message):
    with pytest.raises(ConstraintError, match=message):
        compile_lark(source, BYTES)


def test_a_spent_bound_is_an_error_and_not_a_refused_token():
    rules = ["start: r0 /b/", *(f"r{i}: r{i + 1} | r{i + 1} r{i + 1}" for i in range(40))]
    constraint = compile_lark("\n".join([*rules, 'r40: "a" | ""']), BYTES).start()
    start = time.monotonic()

    def run():
        for _ in range(100):
            assert constraint.accept(ord("a"))
            constraint.mask()

    with pytest.raises(ConstraintRuntimeError, match="max is 2000"):
        run()
    assert time.monotonic() - start < 20
