# SPDX-License-Identifier: Apache-2.0
"""Options are validated by name, type and range."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_ext.methods import METHODS, OptionError, parse_options, unknown_method

DYSPEC = METHODS["dyspec"]


def test_defaults_need_nothing() -> None:
    assert parse_options(DYSPEC, {}).num_speculative_tokens > 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"no_such": 1}, r"unknown option 'no_such' \(given 1\)"),
        ({"num_speculative_tokens": 0}, "'num_speculative_tokens' given as 0: .*greater than"),
        ({"num_speculative_tokens": 500}, "'num_speculative_tokens' given as 500"),
        ({"num_speculative_tokens": "8"}, "given as '8': .*integer"),
        ({"max_depth": 1.5}, "'max_depth' given as 1.5"),
        ({"min_probability": 1.0}, "'min_probability' given as 1.0"),
        ({"adaptive": "yes"}, "'adaptive' given as 'yes'"),
    ],
)
def test_bad_options_are_named_with_what_is_allowed(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message) as error:
        parse_options(DYSPEC, given)
    assert "num_speculative_tokens (default" in str(error.value)  # what is allowed


def test_max_nodes_is_another_name() -> None:
    assert parse_options(DYSPEC, {"max_nodes": 5}).num_speculative_tokens == 5
    with pytest.raises(OptionError, match="are one option"):
        parse_options(DYSPEC, {"max_nodes": 5, "num_speculative_tokens": 5})


def test_a_required_option_is_asked_for() -> None:
    with pytest.raises(OptionError, match=r"'datastore' is required.*datastore \(required\)"):
        parse_options(METHODS["datastore"], {})


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("dyspek", "Did you mean 'dyspec'?"),
        ("DySpec", "Did you mean 'dyspec'?"),
        ("ngrams", "Did you mean 'ngram' or"),
        ("Token-Recycling", "Did you mean 'token_recycling'?"),
        (["dyspec"], "Did you mean 'dyspec'?"),
        ("zzz", "method 'zzz'. Methods"),
        (3, "method 3. Methods"),
    ],
)
def test_an_unknown_method_is_told_what_there_is(given: Any, hint: str) -> None:
    message = str(unknown_method(given, ["ngram", "eagle"]))
    assert repr(given) in message
    assert hint in message
    assert f"Methods of vllm-ext: {', '.join(METHODS)}; of vLLM: ngram, eagle." in message


@pytest.mark.parametrize("layers", [4, [0, 2, 5]])
def test_layers_are_a_number_or_a_list(layers: Any) -> None:
    assert vars(parse_options(METHODS["self_draft"], {"layers": layers}))["layers"] == layers


@pytest.mark.parametrize("layers", ["4", 4.0, True, None, [0, "1"], [0, 1.0], [0, True], {"a": 1}])
def test_layers_that_are_no_whole_numbers(layers: Any) -> None:
    with pytest.raises(OptionError, match=r"'layers' given as .*give a whole number, or a list"):
        parse_options(METHODS["self_draft"], {"layers": layers})


def test_self_draft_is_dyspec_with_layers_in_place_of_a_model() -> None:
    with pytest.raises(OptionError, match=r"'layers' is required"):
        parse_options(METHODS["self_draft"], {})
    with pytest.raises(OptionError, match=r"takes no draft model \(given model='x'\)"):
        parse_options(METHODS["self_draft"], {"layers": 1, "model": "x"})
    mine, theirs = (METHODS[name].options.model_fields for name in ("self_draft", "dyspec"))
    assert set(mine) - {"layers"} == set(theirs) - {"model"}
    for name in set(mine) & set(theirs):
        assert repr(mine[name]) == repr(theirs[name])


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_every_option_is_documented(method: Any) -> None:
    assert method.summary
    assert "arXiv" in method.paper
    for field in method.options.model_fields.values():
        assert field.description
        assert not field.is_required() or method.name in ("datastore", "pearl", "self_draft")


def test_no_method_of_vllm_is_taken_over() -> None:
    pytest.importorskip("vllm")
    from typing import get_args

    from vllm.config import speculative

    def flat(literal: Any) -> set[str]:
        return {name for arg in get_args(literal) for name in (flat(arg) or {arg})}

    theirs = flat(speculative.SpeculativeMethod)
    assert "ngram" in theirs  # control: these are the names
    assert not theirs & set(METHODS)
