# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm_ext.engine import make_tiny_model
from tests.vllm_ext.heads.clock import ticking
from vllm_ext.distill.student import load_target
from vllm_ext.heads.features import read
from vllm_ext.heads.writing import Sample


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("target")
    return load_target(make_tiny_model(folder), torch.device("cpu"))


def test_features_are_the_targets_own_wherever_a_text_lies_in_a_batch(target: Any) -> None:
    samples = [
        Sample([5, 6, 7, 8], [9, 10], 0.0),
        Sample([11], [], 1.0),  # nothing was said: nothing to learn
        Sample([12], [13, 14, 15], 1.0),
    ]
    told: list[int] = []
    found = read(target, samples, 4, told.append)
    assert sum(told) == 2
    assert len(found) == 5
    assert found.token.tolist() == [9, 10, 13, 14, 15]
    assert found.left.tolist() == [2, 1, 3, 2, 1]
    assert found.greedy.tolist() == [True, True, False, False, False]
    begin = 0
    for sample in (samples[0], samples[2]):
        text = torch.tensor([sample.prompt + sample.answer])
        with torch.inference_mode():
            states = target.model(text).last_hidden_state[0]
            probs = target(text).logits[0].softmax(-1)
        for j in range(len(sample.answer)):
            at = len(sample.prompt) - 1 + j  # the row that the token is drawn from
            torch.testing.assert_close(
                found.hidden[begin + j].float(), states[at], rtol=1e-2, atol=1e-2
            )
            best = probs[at].topk(4)
            assert found.ids[begin + j].tolist() == best.indices.tolist()
            torch.testing.assert_close(
                found.probs[begin + j].float(), best.values, rtol=1e-2, atol=1e-3
            )
        begin += len(sample.answer)


def test_what_time_does_not_suffice_for_is_left_out(target: Any) -> None:
    samples = [Sample([5], [1 + i] * (1 + i), float(i % 2)) for i in range(56)]
    told: list[int] = []
    found = read(target, samples, 4, told.append, budget=2.5, clock=ticking(1.0))
    assert sum(told) == 24  # three batches of 8, of which the third ends after the time
    said = [samples[int(token) - 1] for token in found.token.unique()]
    assert len(said) == found.texts == 24
    assert len(found) == sum(len(sample.answer) for sample in said)
    assert max(len(sample.answer) for sample in said) > 32  # not the shortest
    for sample in said:  # what belongs together is still together
        at = found.token == sample.answer[0]
        assert found.left[at].tolist() == list(range(len(sample.answer), 0, -1))
        assert (found.greedy[at] == (sample.temperature == 0)).all()
    assert len(read(target, samples, 4, told.append, budget=-1.0)) > 0
