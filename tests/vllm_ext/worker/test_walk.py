# SPDX-License-Identifier: Apache-2.0
"""The walk through vLLM's real Sampler: its law is the target's, whatever was drafted.

The target is a table of logits per context over a tiny vocabulary.  Outputs are completed to a
fixed length with the target itself (a walk emits a varying number of tokens) and their joint law is
compared with exact enumeration; the negative controls must fail the same comparison.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from proposers.tree import TokenTree
from vllm_ext.worker import walk as module
from vllm_ext.worker.walk import PLACEHOLDER, stack_logprobs, walk

VOCAB, LENGTH = 4, 3
ALPHA = 1e-4  # of each chi-square test; the controls miss it by many orders of magnitude

# Root's children 1 and 2; 1's children 0 and 3; 2's child 2.
TREE = TokenTree((1, 2, 0, 3, 2), (-1, -1, 0, 0, 1), (0.5, 0.4, 0.3, 0.2, 0.1))


def table(seed: int) -> dict[tuple[int, ...], np.ndarray]:
    """Logits of a random target after every context of up to LENGTH tokens."""
    rng = np.random.default_rng(seed)
    contexts = [c for n in range(LENGTH + 1) for c in itertools.product(range(VOCAB), repeat=n)]
    return {context: rng.normal(0, 1.5, VOCAB).astype(np.float32) for context in contexts}


def law(logits: np.ndarray, context: tuple[int, ...], options: dict[str, float]) -> np.ndarray:
    """What vLLM's sampling parameters mean, written out: penalties, temperature, top-k, top-p."""
    x = logits.astype(np.float64).copy()
    for token in set(context):
        x[token] -= options.get("presence", 0.0)
    x /= options["temperature"]
    if "top_k" in options:
        x[x < np.sort(x)[-int(options["top_k"])]] = -np.inf
    p = np.exp(x - x.max())
    p /= p.sum()
    if "top_p" in options:
        order = np.argsort(p)
        keep = np.cumsum(p[order]) > 1 - options["top_p"]
        keep[-1] = True
        p[order[~keep]] = 0.0
        p /= p.sum()
    return p


def exact(target: dict[tuple[int, ...], np.ndarray], options: dict[str, float]) -> np.ndarray:
    """Joint law of LENGTH tokens, flattened."""
    joint = np.ones((VOCAB,) * LENGTH)
    for tokens in itertools.product(range(VOCAB), repeat=LENGTH):
        for n in range(LENGTH):
            joint[tokens] *= law(target[tokens[:n]], tokens[:n], options)[tokens[n]]
    return joint.flatten()


def metadata(count: int, options: dict[str, float], **more: Any) -> SamplingMetadata:
    def full(value: float) -> torch.Tensor:
        return torch.full((count,), value)

    presence = options.get("presence", 0.0)
    greedy = options["temperature"] == 0
    made: dict[str, Any] = {
        "temperature": None if greedy else full(options["temperature"]),
        "all_greedy": greedy,
        "all_random": not greedy,
        "top_p": full(options["top_p"]) if "top_p" in options else None,
        "top_k": full(options["top_k"]).int() if "top_k" in options else None,
        "generators": {},
        "max_num_logprobs": None,
        "no_penalties": not presence,
        "prompt_token_ids": torch.full((count, 1), VOCAB),
        "frequency_penalties": full(0.0),
        "presence_penalties": full(presence),
        "repetition_penalties": full(1.0),
        "output_token_ids": [[] for _ in range(count)],
        "allowed_token_ids_mask": None,
        "bad_words_token_ids": {},
        "logitsprocs": LogitsProcessors(),
    }
    return SamplingMetadata(**{**made, **more})


def paths_of(tree: TokenTree) -> list[tuple[int, ...]]:
    """Tokens on the path to the root and to every node."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        found.append(((*found[parent],) if parent >= 0 else ()) + (token,))
    return [(), *found]


def sample(
    target: dict[tuple[int, ...], np.ndarray],
    options: dict[str, float],
    count: int,
    walker: Callable[..., Any] = walk,
) -> np.ndarray:
    """Walk ``count`` requests at once, complete with the target, count the joint outcomes."""
    rows = torch.from_numpy(np.stack([target[path] for path in paths_of(TREE)]))
    given = metadata(count, options)
    result = walker(
        Sampler(),
        rows.repeat(count, 1),
        given,
        [TREE] * count,
        [i * len(rows) for i in range(count)],
        given.output_token_ids,
        lambda _: None,
    )
    assert given.output_token_ids == [[]] * count  # the path was taken off the histories
    rng = np.random.default_rng(0)
    counts = np.zeros((VOCAB,) * LENGTH)
    for tokens in result.tokens:
        tokens = list(tokens[:LENGTH])
        while len(tokens) < LENGTH:
            context = tuple(tokens)
            tokens.append(int(rng.choice(VOCAB, p=law(target[context], context, options))))
        counts[tuple(tokens)] += 1
    return counts.flatten()


def p_value(counts: np.ndarray, joint: np.ndarray) -> float:
    """Chi-square test of goodness of fit; cells that expect fewer than 5 are merged."""
    expected = joint * counts.sum()
    if counts[joint == 0].sum():
        return 0.0
    order = np.argsort(expected)
    small = order[np.cumsum(expected[order]) < 5]
    big = np.setdiff1d(np.arange(len(joint)), small)
    observed = np.append(counts[big], counts[small].sum())
    wanted = np.append(expected[big], expected[small].sum())
    keep = wanted > 0
    return float(stats.chisquare(observed[keep], wanted[keep]).pvalue)


OPTIONS: list[dict[str, float]] = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 0.6, "top_k": 3},
    {"temperature": 1.0, "presence": 1.5},
    {"temperature": 0.8, "presence": 0.7, "top_k": 3, "top_p": 0.9},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_law_is_the_targets(options: dict[str, float]) -> None:
    torch.manual_seed(7)
    target = table(1)
    counts = sample(target, options, 20_000)
    assert p_value(counts, exact(target, options)) > ALPHA


@pytest.mark.slow
def test_p_values_are_uniform() -> None:
    """Over many targets and seeds: a small bias would pile the p-values up at 0."""
    values = []
    for seed in range(30):
        torch.manual_seed(100 + seed)
        options = OPTIONS[seed % len(OPTIONS)]
        target = table(seed)
        values.append(p_value(sample(target, options, 40_000), exact(target, options)))
    assert stats.kstest(values, "uniform").pvalue > 1e-3


def resampling_walk(
    sampler: Any, logits: Any, given: Any, trees: Any, starts: Any, *rest: Any
) -> Any:
    """Wrong: a draw that misses the children is thrown away and drawn again."""

    def again(**inputs: Any) -> Any:
        first = sampler(logits=inputs["logits"].clone(), sampling_metadata=given)
        second = sampler(logits=inputs["logits"].clone(), sampling_metadata=given)
        missed = [t not in TREE.tokens[:2] for t in first.sampled_token_ids[:, 0].tolist()]
        first.sampled_token_ids[missed] = second.sampled_token_ids[missed]
        return first

    return walk(again, logits, given, trees, starts, *rest)


def pruning_walk(sampler: Any, logits: Any, given: Any, trees: Any, starts: Any, *rest: Any) -> Any:
    """Wrong: a draw that the draft finds unlikely is replaced by the draft's favourite."""

    def pruned(**inputs: Any) -> Any:
        output = sampler(**inputs)
        output.sampled_token_ids[output.sampled_token_ids == 3] = 1
        return output

    return walk(pruned, logits, given, trees, starts, *rest)


def blind_walk(sampler: Any, logits: Any, given: Any, trees: Any, starts: Any, *rest: Any) -> Any:
    """Wrong: penalties do not see the path."""
    return walk(sampler, logits, given, trees, starts, [None] * len(trees), *rest[1:])


@pytest.mark.parametrize(
    ("walker", "options"),
    [
        (resampling_walk, OPTIONS[0]),
        (pruning_walk, OPTIONS[0]),
        (blind_walk, OPTIONS[4]),
    ],
)
def test_negative_controls_fail(walker: Callable[..., Any], options: dict[str, float]) -> None:
    torch.manual_seed(7)
    target = table(1)
    assert p_value(sample(target, options, 20_000, walker), exact(target, options)) < ALPHA


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
