# SPDX-License-Identifier: Apache-2.0
import pytest

from vllm_ext.cli.arms import ArmError, parse_arms


def test_defaults_and_overrides() -> None:
    none, ngram, small = parse_arms(
        "none, ngram,small",
        ['ngram={"num_speculative_tokens": 3}', 'small={"method": "dyspec", "max_depth": 4}'],
    )
    assert none.speculative_config is None
    assert ngram.speculative_config == {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 4,
    }
    assert small.speculative_config == {"method": "dyspec", "max_depth": 4}


def test_only_our_methods_run_with_the_plugin_on() -> None:
    none, ngram, ours = (
        arm.engine_config({"model": "m"}, {"A": "1"}) for arm in parse_arms("none,ngram,dyspec")
    )
    assert none.env == ngram.env == {"A": "1", "VLLM_EXT_DISABLE": "1"}
    assert ours.env == {"A": "1"}
    assert "speculative_config" not in none.llm
    assert ours.llm["speculative_config"] == {"method": "dyspec"}


@pytest.mark.parametrize(
    ("names", "overrides", "said"),
    [
        ("", [], "one or more"),
        ("none,none", [], "different"),
        ("none", ["ngram={}"], "['ngram']"),
        ("none", ["none={}"], "no configuration"),
        ("ngram", ["ngram={"], "NAME=JSON"),
        ("ngram", ["ngram"], "NAME=JSON"),
        ("ngram", ["ngram=[1]"], "NAME={...}"),
    ],
)
def test_malformed_arms_are_refused(names: str, overrides: list[str], said: str) -> None:
    with pytest.raises(ArmError) as caught:
        parse_arms(names, overrides)
    assert said in str(caught.value)


def test_arms_with_a_draft_model() -> None:
    ours, vllms, plain = parse_arms("dyspec+model,draft_model,dyspec", draft="small")
    assert ours.name == "dyspec+model"
    assert ours.speculative_config == {"method": "dyspec", "model": "small"}
    assert vllms.speculative_config == {
        "method": "draft_model",
        "num_speculative_tokens": 3,
        "model": "small",
    }
    assert plain.speculative_config == {"method": "dyspec"}
    (own,) = parse_arms("dyspec+model", ['dyspec+model={"model": "other"}'])
    assert own.speculative_config == {"method": "dyspec", "model": "other"}


@pytest.mark.parametrize("name", ["dyspec+model", "draft_model"])
def test_a_missing_draft_model_is_told(name: str) -> None:
    with pytest.raises(ArmError, match="--draft"):
        parse_arms(name)
