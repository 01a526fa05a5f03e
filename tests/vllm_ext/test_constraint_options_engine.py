# SPDX-License-Identifier: Apache-2.0
"""What an operator sets for constraints when an engine starts: limits, weights through logprobs."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.vllm_ext.engine import make_engine, make_tiny_model, prompts
from vllm_ext import constraints

pytestmark = pytest.mark.engine

EOS = 1
LIMIT = 20
TREES = {"method": "dyspec", "num_speculative_tokens": 12, "adaptive": False}
# Prompts in one piece: stock vLLM on CPUs cannot chunk those of seeded requests.
WHOLE: dict[str, Any] = {"max_num_batched_tokens": 1024}
SHOWS: dict[str, Any] = {"logprobs_mode": "processed_logits"}
SMALL: dict[str, Any] = {"additional_config": {"vllm_ext_constraints": {"max_bytes": LIMIT}}}
ENGINES: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "shows weights": (None, WHOLE | SHOWS | SMALL),
    "shows weights, trees": (TREES, SHOWS),
    "as installed": (None, WHOLE),
}


class Engines:
    """Engines by name, each started when it is first asked for."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.started: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self.started:
            speculative, options = ENGINES[name]
            self.started[name] = make_engine(self.model, speculative, **options)
        return self.started[name]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    started = Engines(make_tiny_model(tmp_path_factory.mktemp("model")))
    yield started
    for engine in started.started.values():
        engine.llm_engine.engine_core.shutdown()


@dataclass(frozen=True)
class Answer:
    """A text's weight as its logprobs show it, and as its record holds it."""

    shown: list[float]
    record: Any


def answers(engine: Any, keys: dict[str, Any], count: int = 6, **options: Any) -> list[Answer]:
    from vllm import SamplingParams

    names = [uuid.uuid4().hex for _ in range(count)]
    asked = [
        SamplingParams(
            **{"max_tokens": 24, "temperature": 0.7, "seed": seed, "logprobs": 0} | options,
            extra_args={**keys, "constraint_id": name},
        )
        for seed, name in enumerate(names)
    ]
    outputs = engine.generate(prompts(count, seed=3), asked, use_tqdm=False)
    records = constraints.results(engine, names)
    found = []
    for name, output in zip(names, outputs, strict=True):
        [completion] = output.outputs
        pairs = zip(completion.token_ids, completion.logprobs, strict=True)
        [record] = records[name]
        found.append(Answer([entry[token].logprob for token, entry in pairs], record))
    return found


@pytest.mark.parametrize("engine", ["shows weights", "shows weights, trees"])
@pytest.mark.parametrize(
    ("keys", "options"),
    [
        ({"constraint_method": "awrs"}, {}),
        ({"constraint_method": "awrs"}, {"temperature": 1.4, "top_k": 200, "logprobs": 2}),
        ({"constraint_method": "masking"}, {"top_p": 0.999}),
        ({"constraint_method": "asap"}, {"temperature": 1.0}),
    ],
)
def test_logprobs_of_a_text_sum_to_its_log_weight(
    engines: Engines, engine: str, keys: dict[str, Any], options: dict[str, Any]
) -> None:
    letters = engines[engine].get_tokenizer().encode("abcde")
    lifted = dict.fromkeys([EOS, *letters], 5.0)  # into the reach of top-k and top-p
    asked = {"constraint_regex": "[a-e]{1,3}", **keys}
    found = answers(engines[engine], asked, logit_bias=lifted, **options)
    complete = [answer for answer in found if answer.record.state == "complete"]
    assert len(complete) >= 3
    for answer in complete:
        weight = math.fsum(answer.record.log_weights)
        assert math.fsum(answer.shown) == pytest.approx(weight, abs=1e-4)
        assert weight < -0.1  # or a sum of zeros would pass
    for answer in found:
        assert len(answer.shown) <= len(answer.record.log_weights)
        for shown, weight in zip(answer.shown, answer.record.log_weights, strict=False):
            dead = weight == -math.inf
            assert shown < -1e29 if dead else shown == pytest.approx(weight, abs=1e-4)


def test_without_that_mode_logprobs_are_no_weights(engines: Engines) -> None:
    """The control: the model's own logprobs, of the same texts with the same weights."""
    keys = {"constraint_regex": "[a-z]{1,4}[0-9]?"}
    ours, stock = (answers(engines[name], keys) for name in ("shows weights", "as installed"))
    assert [a.record.token_ids for a in ours] == [a.record.token_ids for a in stock]
    for mine, theirs in zip(ours, stock, strict=True):
        weight = math.fsum(theirs.record.log_weights)
        assert weight == pytest.approx(math.fsum(mine.record.log_weights), abs=1e-4)
        assert math.fsum(theirs.shown) != pytest.approx(weight, abs=0.1)


@pytest.mark.parametrize("engine", ["shows weights", "shows weights, trees"])
def test_dead_ends_show_a_weight_of_zero(engines: Engines, engine: str) -> None:
    [dead] = answers(engines[engine], {"constraint_regex": "[^ -~]ab"}, count=1, top_k=1)
    assert (dead.record.state, dead.record.log_weights[-1]) == ("dead_end", -math.inf)
    assert math.fsum(dead.shown) < -1e29


def test_a_request_above_a_limit_is_told_which_and_how_to_raise_it(
    engines: Engines,
) -> None:
    from vllm.exceptions import VLLMValidationError

    small, installed = engines["shows weights"], engines["as installed"]
    allowed = {"constraint_regex": "a" * LIMIT}
    long = {"constraint_regex": "a" * (LIMIT + 1)}
    with pytest.raises(VLLMValidationError) as refusal:
        answers(small, long)
    for told in (
        "constraint_regex",
        f"{LIMIT + 1} bytes given, at most {LIMIT} allowed (limit max_bytes;",
        """--additional-config '{"vllm_ext_constraints": {"max_bytes": N}}'""",
    ):
        assert told in str(refusal.value)
    for engine, keys in ((small, allowed), (installed, long)):
        assert {a.record.state for a in answers(engine, keys, max_tokens=30)} == {"complete"}


def test_unknown_limits_start_no_engine(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.core_client import EngineCoreClient

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(EngineCoreClient, "make_client", started)

    def start(limit: str) -> None:
        options = {"vllm_ext_constraints": {limit: 9}}
        make_engine(engines.model, None, additional_config=options)

    with pytest.raises(ValueError, match="unknown option 'max_byte'"):
        start("max_byte")
    with pytest.raises(AssertionError, match="an engine was started"):
        start("max_bytes")  # the control: with a known one it comes so far
