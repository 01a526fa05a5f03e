# SPDX-License-Identifier: Apache-2.0
import json
import signal
import threading
import time

import pytest
from toy_model import BYTES

from logits_processors import vetting
from logits_processors.constraint import ConstraintError
from logits_processors.limits import Limits
from logits_processors.vetting import Vetter

AMBIGUOUS = "\n".join(
    [
        'root ::= r0 "b"',
        *(f"r{i} ::= r{i + 1} | r{i + 1} r{i + 1}" for i in range(40)),
        'r40 ::= "a" | ""',
    ]
)

NESTED = 'root ::= (((("a"{1,100}){1,100}){1,100}){1,100}){1,100}'


@pytest.fixture(scope="module")
def vetter():
    with Vetter(BYTES, Limits(compile_seconds=2.0)) as vetter:
        yield vetter


def test_honest_constraints_pass(vetter):
    vetter.check("ebnf", 'root ::= "a"+')
    vetter.check("json_schema", '{"type": "integer"}')
    vetter.check("lark", 'start: "a"')
    vetter.check("regex_partial", r"(a)\1")
    vetter.check("json_validate", '{"not": {}}')


def test_errors_come_back(vetter):
    with pytest.raises(ConstraintError, match="line 1, column 6"):
        vetter.check("ebnf", 'root := "a"')
    with pytest.raises(ConstraintError, match="'yaml' is unknown"):
        vetter.check("yaml", "a")


def test_a_child_that_died_in_between_is_replaced(vetter):
    vetter.check("regex_partial", "a")
    vetter._child.kill()
    vetter._child.wait()
    vetter.check("regex_partial", "b")


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("ebnf", AMBIGUOUS),
        # The first allowed token is the one that ends it.
        ("ebnf", AMBIGUOUS.replace('"b"', '"0"')),
        pytest.param("ebnf", NESTED, marks=pytest.mark.slow),
    ],
)
def test_exploding_grammars_are_ended(vetter, kind, source):
    vetter.check("ebnf", 'root ::= "a"')  # the child is up: only the constraint is timed
    start = time.monotonic()
    with pytest.raises(ConstraintError, match=r"compile_seconds|check_seconds"):
        vetter.check(kind, source)
    assert time.monotonic() - start < 1.5 * vetting.STARVED * vetter._limits.compile_seconds
    vetter.check("ebnf", 'root ::= "a"')


@pytest.mark.slow
def test_memory_is_bounded():
    schema = json.dumps({"enum": [f"value {i}" for i in range(30000)]})
    with (
        Vetter(BYTES, Limits(compile_seconds=60.0, compile_memory_mb=8)) as small,
        pytest.raises(ConstraintError, match="compile_memory_mb"),
    ):
        small.check("json_schema", schema)


def test_time_is_the_processors_not_the_walls(vetter):
    """A child that is kept from running is not charged for it."""
    vetter.check("regex_partial", "a")
    child = vetter._child
    child.send_signal(signal.SIGSTOP)
    wake = threading.Timer(
        1.5 * vetter._limits.compile_seconds, child.send_signal, [signal.SIGCONT]
    )
    wake.start()
    try:
        vetter.check("ebnf", 'root ::= "a"+ "b"')
    finally:
        wake.join()
    assert vetter._child is child


def test_a_child_that_hangs_is_given_up(monkeypatch):
    """Negative control of the test above: there is an end to patience on the wall, too."""
    monkeypatch.setattr(vetting, "STARVED", 0.5)
    with Vetter(BYTES, Limits(compile_seconds=1.0)) as vetter:
        vetter.check("regex_partial", "a")
        vetter._child.send_signal(signal.SIGSTOP)
        with pytest.raises(ConstraintError, match="compile_seconds"):
            vetter.check("regex_partial", "b")
        vetter.check("regex_partial", "c")
