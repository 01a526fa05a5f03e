# SPDX-License-Identifier: Apache-2.0
import pytest

from vllm_ext.cli.presets import PRESETS, PresetError, describe_presets, parse_presets


def test_names_are_looked_up_and_all_means_every_preset() -> None:
    assert list(parse_presets("seeded, greedy")) == ["seeded", "greedy"]
    assert parse_presets("all") == dict(PRESETS)


@pytest.mark.parametrize("names", ["", "nucleus", "greedy,greedy", "greedy,all"])
def test_unknown_or_repeated_names_are_refused(names: str) -> None:
    with pytest.raises(PresetError, match="min_p"):
        parse_presets(names)


def test_seeded_presets_give_every_prompt_its_own_seed() -> None:
    seeds = {PRESETS["seeded"].params(i, 8)["seed"] for i in range(20)}
    assert len(seeds) == 20
    assert "seed" not in PRESETS["greedy"].params(0, 8)


def test_sampled_presets_are_seeded_because_else_nothing_could_be_compared() -> None:
    sampled = [n for n, p in PRESETS.items() if p.kwargs["temperature"] > 0]
    assert len(sampled) >= 4
    assert all(PRESETS[name].seeded for name in sampled)


def test_every_preset_is_accepted_by_vllm() -> None:
    vllm = pytest.importorskip("vllm")
    from vllm.sampling_params import StructuredOutputsParams

    for preset in PRESETS.values():
        params = preset.params(index=0, max_tokens=16)
        if "structured_outputs" in params:
            params["structured_outputs"] = StructuredOutputsParams(**params["structured_outputs"])
        assert vllm.SamplingParams(**params).max_tokens == 16


def test_every_preset_is_documented() -> None:
    text = "\n".join(describe_presets())
    assert all(f"{name}: " in text for name in PRESETS)
