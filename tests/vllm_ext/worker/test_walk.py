# SPDX-License-Identifier: Apache-2.0
"""The walk through vLLM's real Sampler: its law is the target's, whatever was drafted.

The comparison with exact enumeration is that of ``examples/walk_law.py``, at a smaller size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import typer
from scipy import stats
from typer.testing import CliRunner
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.sampler import Sampler

from proposers.tree import TokenTree
from tests.loading import load_example
from vllm_ext.worker import walk as module
from vllm_ext.worker.walk import PLACEHOLDER, stack_logprobs, walk

walk_law = load_example("walk_law")
TREE, VOCAB, metadata = walk_law.TREE, walk_law.VOCAB, walk_law.metadata

ALPHA = 1e-4  # of each chi-square test; the controls miss it by many orders of magnitude


def p_value(
    options: dict[str, float], seed: int, draws: int, walker: Callable[..., Any] = walk
) -> float:
    torch.manual_seed(seed)
    target = walk_law.table(seed)
    counts, accepted = walk_law.sample(target, options, draws, walker)
    assert accepted > 0.1  # else nothing is tested
    return float(walk_law.p_value(counts, walk_law.exact(target, options)))


@pytest.mark.parametrize("options", walk_law.SETTINGS, ids=str)
def test_law_is_the_targets(options: dict[str, float]) -> None:
    assert p_value(options, 1, 20_000) > ALPHA


@pytest.mark.slow
def test_p_values_are_uniform() -> None:
    """Over many targets and seeds: a small bias would pile the p-values up at 0."""
    lines = [
        walk_law.measure("walk", walk, options, targets=3, draws=40_000, first=100 * i)
        for i, options in enumerate(walk_law.SETTINGS)
    ]
    values = [value for line in lines for value in line.p_values]
    assert stats.kstest(values, "uniform").pvalue > 1e-3


@pytest.mark.parametrize(("name", "walker", "options"), walk_law.CONTROLS)
def test_negative_controls_fail(
    name: str, walker: Callable[..., Any], options: dict[str, float]
) -> None:
    assert p_value(options, 1, 20_000, walker) < ALPHA


@pytest.mark.parametrize("broken", [False, True])
def test_the_report_tells_right_from_wrong(
    broken: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(sampler: Any, *rest: Any) -> Any:
        def changed(**inputs: Any) -> Any:
            output = sampler(**inputs)
            output.sampled_token_ids[output.sampled_token_ids == 3] = 1
            return output

        return walk(changed, *rest)

    monkeypatch.setattr(walk_law, "SETTINGS", walk_law.SETTINGS[:1])
    if broken:
        monkeypatch.setattr(walk_law, "walk", wrong)
    app = typer.Typer()
    app.command()(walk_law.main)
    args = ["--json", str(tmp_path / "law.json"), "--targets", "8", "--draws", "4000"]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == int(broken), done.output
    assert done.stdout.count("control") == 3


def greedy_result(trees: list[TokenTree], logits: torch.Tensor, **more: Any) -> Any:
    starts = np.cumsum([0, *[len(tree) + 1 for tree in trees[:-1]]]).tolist()
    given = metadata(len(trees), {"temperature": 0.0}, **more)
    return walk(Sampler(), logits, given, trees, starts, given.output_token_ids, lambda _: None)


def one_hot(tokens: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(tokens), VOCAB).float()


def test_greedy_follows_the_argmax_and_adds_one_token() -> None:
    # root -> 2 (node 1) -> 2 (node 4) -> emits 0; the other request's draft misses at once.
    logits = one_hot([2, 0, 2, 0, 0, 0, 3, 1])
    result = greedy_result([TREE, TokenTree.chain([0], [0.5])], logits)
    assert result.tokens == [[2, 2, 0], [3]]
    assert result.paths == [[1, 4], []]
    assert result.padded(torch.device("cpu")).tolist() == [
        [2, 2, 0],
        [3, PLACEHOLDER, PLACEHOLDER],
    ]


def test_logprobs_are_stacked_request_by_request() -> None:
    logits = one_hot([2, 0, 2, 0, 0, 0, 3, 1])
    result = greedy_result([TREE, TokenTree.chain([0], [0.5])], logits, max_num_logprobs=1)
    stacked = stack_logprobs(result.logprobs)
    assert isinstance(stacked, LogprobsTensors)
    assert stacked.logprob_token_ids[:3, 0].tolist() == [2, 2, 0]
    assert int(stacked.logprob_token_ids[3, 0]) == 3


def seeded_second_request(
    neighbour: TokenTree, rows: torch.Tensor, walker: Any = walk
) -> list[Any]:
    """Tokens and next draw of a seeded request that shares its batch with ``neighbour``."""
    generator = torch.Generator().manual_seed(5)
    given = metadata(2, {"temperature": 1.0}, generators={1: generator})
    logits = torch.cat([rows, torch.zeros(1, VOCAB)])
    result = walker(
        Sampler(),
        logits,
        given,
        [neighbour, TokenTree.EMPTY],
        [0, len(rows)],
        given.output_token_ids,
        lambda _: None,
    )
    return [result.tokens[1], int(torch.randint(1 << 30, (1,), generator=generator))]


def test_a_seeded_request_does_not_feel_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = TokenTree.chain([0, 0, 0], [0.9, 0.8, 0.7])
    certain = one_hot([0, 0, 0, 0]) * 1e4
    alone = seeded_second_request(TokenTree.EMPTY, certain[:1])
    assert seeded_second_request(deep, certain) == alone
    monkeypatch.setattr(module, "_with_generators", lambda given, drawing, count: given)
    assert seeded_second_request(deep, certain) != alone  # the control


def test_undrawn_requests_keep_their_generator() -> None:
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    given = metadata(1, {"temperature": 1.0}, generators={0: generator})
    walk(
        Sampler(),
        torch.zeros(1, VOCAB),
        given,
        [TokenTree.EMPTY],
        [0],
        given.output_token_ids,
        lambda _: None,
        undrawn=[0],
    )
    assert torch.equal(generator.get_state(), state)


def test_histories_survive_an_error() -> None:
    history = [[1, 2]]

    def failing(_: object) -> None:
        raise RuntimeError("a processor failed")

    with pytest.raises(RuntimeError, match="processor failed"):
        walk(
            Sampler(),
            one_hot([2, 0, 2, 0, 0, 0]),
            metadata(1, {"temperature": 0.0}),
            [TREE],
            [0],
            history,
            failing,
        )
    assert history == [[1, 2]]
