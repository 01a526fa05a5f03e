# SPDX-License-Identifier: Apache-2.0
"""Which requests get drawn trees, and which verification."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)

from logits_processors.vllm_v1 import V1Processor
from proposers.tree import TokenTree
from vllm_ext.worker.sampled_runner import SampledDraftsMixin, _keeps_text


class Spy:
    """Stands for `SampledDrafting`."""

    def __init__(self) -> None:
        self.applicants: list[Any] = []
        self.asked: dict[str, Any] = {}
        self.learned: list[Any] = []

    def propose(self, applicants: Any, cost: Any, **rest: Any) -> dict[str, TokenTree]:
        self.applicants, self.cost, self.rest = applicants, cost, rest
        return {}

    def verification(self, request: str, params: Any, position: int, tree: Any, **how: Any) -> Any:
        self.asked[request] = (position, tree, how["as_it_goes"])
        return f"verification of {request}"

    def learn(self, *outcome: Any) -> None:
        self.learned.append(outcome)


class Runner(SampledDraftsMixin):
    """The mixin over a batch of stand-ins."""

    def __init__(self, requests: dict[str, Any], *processors: Any) -> None:
        names = list(requests)
        self.requests = {
            name: SimpleNamespace(sampling_params=params, output_token_ids=[1, 2], num_tokens=9)
            for name, params in requests.items()
        }
        self.input_batch: Any = SimpleNamespace(
            req_ids=names,
            num_reqs=len(names),
            req_id_to_index={name: row for row, name in enumerate(names)},
            logitsprocs=SimpleNamespace(all=list(processors)),
            num_logprobs={},
            sampling_metadata=SimpleNamespace(logprob_token_ids=None),
        )
        self.discard_request_mask = SimpleNamespace(np=np.zeros(len(names), bool))
        self.trees_refused: str | None = None
        self._timer = SimpleNamespace(cost=SimpleNamespace(in_context=lambda *what: what))
        self.spy = Spy()
        self._sampled: Any = self.spy


def ours(*rows: int) -> Any:
    processor: Any = object.__new__(V1Processor)
    processor._rows = dict.fromkeys(rows)
    return processor


def builtin(kind: Any, **fields: Any) -> Any:
    processor = object.__new__(kind)
    processor.__dict__.update(fields)
    return processor


SAMPLED = SamplingParams(temperature=0.7)
GREEDY = SamplingParams(temperature=0.0)
GRAMMAR = SamplingParams(
    temperature=0.7, structured_outputs=StructuredOutputsParams(choice=["a", "b"])
)


def test_who_gets_drawn_trees() -> None:
    requests = {"s": SAMPLED, "g": GREEDY, "c": SAMPLED, "x": GRAMMAR, "off": SAMPLED}
    runner = Runner(requests, ours(2))
    limits = dict.fromkeys(requests, 8) | {"off": 0}
    runner._draw_trees(list(requests), limits, 7, 50)
    assert [(a.request, a.chain, a.limit, a.position) for a in runner.spy.applicants] == [
        ("s", False, 8, 2),
        ("x", True, 8, 2),
    ]
    assert runner.spy.rest == {"base_rows": 12, "base_tokens": 5.0, "most": 50}
    assert runner.spy.cost == (12, [9] * 5)  # of all requests that will decode
    runner.trees_refused = "no tree attention"
    runner._draw_trees(["s"], limits, 0, 50)
    assert runner.spy.applicants[0].chain


def test_nobody_without_a_rule() -> None:
    runner = Runner({"s": SAMPLED})
    runner._sampled = None
    assert runner._draw_trees(["s"], {"s": 8}, 0, 50) == {}
    assert runner._verify_how(None) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "predictor", "drawn"),
    [
        ({"verify": "match"}, object(), False),
        ({"verify": "swor"}, None, False),
        ({"verify": "swor"}, object(), True),
        ({}, object(), False),
    ],
)
def test_when_trees_are_drawn_at_all(options: dict[str, str], predictor: Any, drawn: bool) -> None:
    runner = Runner({})
    runner._options = SimpleNamespace(
        **options, draw="beam", max_depth=3, max_batch_nodes=9, adaptive=True
    )
    runner._predictor = predictor
    runner.model_config = SimpleNamespace(seed=0)  # type: ignore[attr-defined]
    assert (runner._new_sampled() is not None) == drawn


def test_verification_by_request() -> None:
    runner = Runner({"a": SAMPLED, "p": SAMPLED, "l": SAMPLED, "t": SAMPLED})
    runner.discard_request_mask.np[1] = True
    runner.input_batch.num_logprobs = {"l": 2}
    runner.input_batch.sampling_metadata.logprob_token_ids = {3: [5]}
    trees = [TokenTree.chain([n], [0.5]) for n in range(4)]
    found = runner._verify_how(SimpleNamespace(trees=trees))  # type: ignore[arg-type]
    assert found[1] is None  # an unfinished prompt
    assert found[0] == "verification of a"
    assert runner.spy.asked == {
        "a": (2, trees[0], False),
        "l": (2, trees[2], True),
        "t": (2, trees[3], True),
    }


def test_outcomes_are_told() -> None:
    runner = Runner({"a": SAMPLED, "b": SAMPLED})
    runner._verifications = (None, object())  # type: ignore[assignment]
    walked = SimpleNamespace(tokens=[[1], [2, 3]], paths=[[], [0]])
    runner._learn_draws(["a", "b"], walked)  # type: ignore[arg-type]
    assert runner.spy.learned == [("b", [2, 3], [0])]


def test_processors_that_keep_what_they_have_seen() -> None:
    class Custom:
        pass

    assert _keeps_text(Custom(), 0)
    assert not _keeps_text(builtin(LogitBiasLogitsProcessor), 0)
    assert not _keeps_text(builtin(MinPLogitsProcessor), 0)
    waiting = builtin(MinTokensLogitsProcessor, min_toks={1: ()})
    assert [_keeps_text(waiting, row) for row in range(3)] == [False, True, False]
    assert [_keeps_text(ours(2), row) for row in range(3)] == [False, False, True]
    assert Runner({"a": SAMPLED}, Custom())._as_it_goes("a", 0)
    assert not Runner({"a": SAMPLED}, waiting)._as_it_goes("a", 0)
