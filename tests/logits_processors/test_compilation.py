# SPDX-License-Identifier: Apache-2.0
import pytest
from toy_model import BYTES

from logits_processors.compilation import Spec, compile_constraint
from logits_processors.constraint import ConstraintError


def test_unknown_kinds_are_refused_with_the_known_ones():
    with pytest.raises(ConstraintError, match="'yaml' is unknown; known: json_schema"):
        compile_constraint(Spec("yaml", "a"), BYTES)


def test_arguments_belong_to_predicates():
    with pytest.raises(ConstraintError, match="only predicates"):
        compile_constraint(Spec("ebnf", 'root ::= "a"', "argument"), BYTES)
    with pytest.raises(ConstraintError, match="not registered"):
        compile_constraint(Spec("predicate", "absent", "argument"), BYTES)
