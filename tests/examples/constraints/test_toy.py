# SPDX-License-Identifier: Apache-2.0
"""The toy on a language and a model of our own, small enough for seconds."""

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from divergence import curve, kl, noise_floor, smoothed
from language import Prefix, enumerate_language
from methods import DEAD, METHODS, Run, Toy
from report import draw, page, table
from toy import CURVES, study

from logits_processors.law import SamplingLaw
from logits_processors.smc import Particles
from logits_processors.vocabulary import Vocabulary
from logits_processors.xgrammar_constraint import compile_xgrammar

EOS = 4
VOCABULARY = Vocabulary((b"x", b"y", b"z", b"yz", b""), eos_ids=(EOS,))
GRAMMAR = 'root ::= "xx" | "x" [yz] [xyz] | "yz" "x"?'
TEXTS = ("xx", *("x" + a + b for a, b in itertools.product("yz", "xyz")), "yz", "yzx")
LAW = SamplingLaw()
LEANING = np.array([0.0, 0.0, 1.0, 0.5, 0.5])


def rows(prefixes: Sequence[Prefix]) -> Any:
    """A model that likes to begin as the constraint wants and then to leave it."""
    made = []
    for prefix in prefixes:
        generator = np.random.default_rng([7, *(token + 1 for token in prefix)])
        made.append(generator.normal(size=VOCABULARY.size) + LEANING)
    return np.array(made)


@pytest.fixture(scope="module")
def toy() -> Toy:
    compiled = compile_xgrammar("ebnf", GRAMMAR, VOCABULARY)
    return Toy(compiled, enumerate_language(compiled, rows, LAW), LAW)


def test_the_language_is_enumerated_with_every_spelling(toy: Toy) -> None:
    joint: dict[Prefix, float] = {}
    for length in range(1, 5):
        for tokens in itertools.product(range(4), repeat=length):
            if VOCABULARY.spell(tokens).decode() in TEXTS:
                text = (*tokens, EOS)
                logs = [LAW.log_probs(rows([text[:i]])[0])[t] for i, t in enumerate(text)]
                joint[text] = math.exp(sum(logs))
    assert set(toy.language.texts) == set(joint)
    assert len(joint) == len(TEXTS) + 2 + 1  # "yz" and "yzx" in two ways, and "xyz"
    mass = sum(joint.values())
    assert toy.language.mass == pytest.approx(mass, rel=1e-12)
    found = dict(zip(toy.language.texts, toy.language.truth, strict=True))
    assert found == pytest.approx({text: p / mass for text, p in joint.items()})
    assert toy.language.masked.sum() == pytest.approx(1.0)


def test_endless_languages_are_refused() -> None:
    compiled = compile_xgrammar("ebnf", 'root ::= "x" root | "y"', VOCABULARY)
    with pytest.raises(ValueError, match="more than 20 prefixes"):
        enumerate_language(compiled, rows, LAW, max_prefixes=20)


def last(found: dict[str, Any], label: str) -> float:
    return float(np.median([repetition[-1] for repetition in found["curves"][label]]))


def judge(found: dict[str, Any]) -> list[str]:
    """What is wrong with a study; empty if it shows what it must."""
    wrong = []
    limit = found["masking_limit"]
    floors = {"CARS": found["floor"], **found["weighted_floors"]}
    for label in ("masking", "AWRS without its weights"):
        if not 0.7 * limit < last(found, label) < 1.4 * limit:
            wrong.append(f"{label} is not at the limit of masking")
    for label, floor in floors.items():
        if last(found, label) > 1.5 * floor["high"][-1]:
            wrong.append(f"{label} is above the noise")
    for method, weight in found["weights"].items():
        if abs(weight["mean_weight"] - found["mass"]) > 3 * weight["standard_error"]:
            wrong.append(f"the mean weight of {method} is not the mass")
    return wrong


@pytest.fixture(scope="module")
def found(toy: Toy) -> dict[str, Any]:
    return study(toy, [16, 64, 256], repetitions=2, seed=1, name="own")


def test_masking_is_biased_and_the_others_are_not(found: dict[str, Any]) -> None:
    assert found["masking_limit"] > 5 * found["floor"]["high"][-1]
    assert judge(found) == []
    assert found["costs"]["cars"]["restarts_per_text"] > 0
    assert found["costs"]["masking"]["checks_per_row"] == 0
    assert all(cost["dead_texts"] == 0 for cost in found["costs"].values())


def test_samplers_that_cheat_are_noticed(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    real = dict(METHODS)

    def unweighted(toy: Toy, count: int, seed: int) -> Run:
        run = real["awrs"](toy, count, seed)
        return Run(run.texts, np.zeros(count), 0, 0, run.rows, 0)

    monkeypatch.setitem(METHODS, "cars", real["masking"])
    monkeypatch.setitem(METHODS, "awrs", unweighted)
    monkeypatch.setattr(Particles, "absolute_log_weights", property(lambda self: self.log_weights))
    assert judge(study(toy, [256], repetitions=2, seed=1, name="own")) == [
        "CARS is above the noise",
        "AWRS is above the noise",
        "the mean weight of awrs is not the mass",
        "the mean weight of smc is not the mass",
    ]


@pytest.mark.slow
def test_thousands_of_samples(toy: Toy) -> None:
    found = study(toy, [4096], repetitions=3, seed=2, name="own")
    assert judge(found) == []
    assert last(found, "ASAp") < 2.0 * found["floor"]["high"][-1]
    assert found["masking_limit"] > 40 * found["floor"]["high"][-1]


def test_divergence_of_known_laws() -> None:
    truth = np.array([0.5, 0.5, 0.0])
    assert kl(truth, np.array([0.25, 0.5, 0.25])) == pytest.approx(0.5 * math.log(2))
    np.testing.assert_allclose(smoothed(np.array([1.0, 0.0]), 3), [3.5 / 4, 0.5 / 4])
    run = Run(np.array([0, 1, DEAD, 1]), np.log([0.2, 0.6, 1e-9, 0.2]), 0, 0, 0, 0)
    # Two of three living samples are the second text; by weight it has 0.8 of the mass.
    for weighted, share in ((False, 2 / 3), (True, 0.8)):
        law = smoothed(np.array([1 - share, share, 0.0]), 4)
        assert curve(truth, run, [4], weighted) == pytest.approx([kl(truth, law)])


def test_the_floor_is_that_of_counting() -> None:
    truth = np.full(9, 1 / 9)
    floor = noise_floor(truth, [200, 2000])
    # Half the degrees of freedom over n, as for any likelihood ratio.
    assert floor["mean"][1] == pytest.approx(8 / 4000, rel=0.1)
    assert floor["low"][0] < floor["mean"][0] < floor["high"][0]
    # Weighted samples are worth fewer draws, and the floor rises by as much.
    weighted = noise_floor(truth, [20_000], share=0.1)
    assert weighted["mean"][0] == pytest.approx(floor["mean"][1], rel=0.1)


def test_the_report(found: dict[str, Any], tmp_path: Path) -> None:
    assert json.loads(json.dumps(found)) == found
    text = table(found)
    assert all(label in text for label in CURVES)
    assert f"stays at {found['masking_limit']:.4f}" in text
    agreement = {
        "method": "cars",
        "texts": 3,
        "same_texts": 2,
        "same_attempts": 1,
        "attempts": 9,
        "largest_log_weight_difference": 1e-5,
    }
    result = {
        "environment": {
            "cpu": "a cpu",
            "versions": {"numpy": "2.0", "vllm": None},
            "git_commit": "abc",
            "command": ["toy.py", "tasks.jsonl"],
        },
        "settings": {
            "model": "a model",
            "dtype": "float32",
            "chat": True,
            "temperature": 1.0,
            "seed": 0,
        },
        "studies": [found],
        "engine": [agreement],
    }
    whole = page(result)
    assert text in whole
    assert "a model, float32, temperature 1.0, chat template" in whole
    assert "| cars | 3 | 2 | 9 (1 of 3 texts) | 1.0e-05 |" in whole
    pytest.importorskip("matplotlib")
    draw(found, tmp_path / "toy.png")
    assert (tmp_path / "toy.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["toy.py", "report.py"])
def test_the_scripts_explain_themselves(name: str, tmp_path: Path) -> None:
    script = Path(__file__).parents[3] / "examples" / "constraints" / name
    command = [sys.executable, str(script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
