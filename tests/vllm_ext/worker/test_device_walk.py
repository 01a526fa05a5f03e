# SPDX-License-Identifier: Apache-2.0
"""The walk on the device draws the tokens of the sequential walk, through vLLM's real Sampler."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from proposers.tree import TokenTree
from vllm_ext.worker import device_walk as module
from vllm_ext.worker.device_walk import DeviceWalk, to_host
from vllm_ext.worker.walk import WalkResult, walk

VOCAB = 24
TREES_PER_BATCH = 4
BATCHES = 250  # a thousand trees
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gpu_sampler() -> Sampler:
    """vLLM's sampler, drawing as it does on a GPU: seeded requests take this path there."""
    sampler = Sampler()
    sampler.topk_topp_sampler.forward = sampler.topk_topp_sampler.forward_native
    return sampler


class Batch:
    """Random trees whose tokens are likely under random logits, and random sampling parameters."""

    def __init__(self, seed: int, kind: str) -> None:
        rng = np.random.default_rng(seed)
        self.trees: list[TokenTree] = []
        rows = []
        for _ in range(TREES_PER_BATCH):
            nodes = int(rng.integers(0, 25))
            logits = rng.normal(0, 2, (nodes + 1, VOCAB)).astype(np.float32)
            favourites = np.argsort(-logits, axis=1)
            taken = [0] * (nodes + 1)
            tokens, parents = [], []
            for node in range(nodes):
                while taken[parent := int(rng.integers(-1, node)) + 1] >= VOCAB:
                    pass
                tokens.append(int(favourites[parent, taken[parent]]))
                taken[parent] += 1
                parents.append(parent - 1)
            self.trees.append(TokenTree(tuple(tokens), tuple(parents), (0.5,) * nodes))
            rows.append(logits)
        self.logits = torch.from_numpy(np.concatenate(rows)).to(DEVICE)
        self.starts = np.cumsum([0, *[len(r) for r in rows[:-1]]]).tolist()
        count = TREES_PER_BATCH
        temperature = rng.choice([0.0, 0.3, 1.0], count) if kind == "mixed" else np.ones(count)
        seeded = range(count) if kind == "seeded" else rng.choice(count, 2, replace=False)
        if kind == "greedy":
            seeded = []
        self.generators = {
            int(r): torch.Generator(DEVICE).manual_seed(seed * 10 + int(r)) for r in seeded
        }
        mask = torch.zeros((count, VOCAB), dtype=torch.bool)
        mask[0, :3] = True
        self.given = metadata(
            count,
            temperature=None if kind == "greedy" else torch.from_numpy(temperature).float(),
            all_greedy=kind == "greedy",
            all_random=kind != "greedy" and bool((temperature > 0).all()),
            top_k=torch.from_numpy(rng.integers(2, VOCAB, count)).int() if seed % 3 else None,
            top_p=torch.from_numpy(rng.uniform(0.5, 1, count)).float() if seed % 2 else None,
            allowed_token_ids_mask=mask if seed % 5 == 0 else None,
        )

    def metadata(self) -> SamplingMetadata:
        copies = {}
        for request, generator in self.generators.items():
            copies[request] = torch.Generator(DEVICE)
            copies[request].set_state(generator.get_state())
        return replace(self.given, generators=copies)

    def sequential(self, given: SamplingMetadata) -> WalkResult:
        histories: list[list[int] | None] = [[] for _ in self.trees]
        torch.manual_seed(0)
        return walk(
            gpu_sampler(),
            self.logits.clone(),
            given,
            self.trees,
            self.starts,
            histories,
            lambda live: None,
        )

    def on_device(self, given: SamplingMetadata) -> WalkResult:
        before = self.logits.clone()
        torch.manual_seed(0)
        walked = DeviceWalk(self.logits, given, self.trees, self.starts)
        assert torch.equal(self.logits, before)  # the drafter still learns from them
        return walked.finish(*to_host(walked.path))


def metadata(count: int, **given: Any) -> SamplingMetadata:
    zeros = torch.zeros(count)
    made: dict[str, Any] = {
        "temperature": None,
        "all_greedy": True,
        "all_random": False,
        "top_p": None,
        "top_k": None,
        "generators": {},
        "max_num_logprobs": None,
        "no_penalties": True,
        "prompt_token_ids": None,
        "frequency_penalties": zeros,
        "presence_penalties": zeros,
        "repetition_penalties": zeros,
        "output_token_ids": [[] for _ in range(count)],
        "allowed_token_ids_mask": None,
        "bad_words_token_ids": {},
        "logitsprocs": LogitsProcessors(),
        **given,
    }
    return SamplingMetadata(
        **{k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in made.items()}
    )


@pytest.mark.parametrize("kind", ["greedy", "seeded", "mixed"])
def test_same_tokens_as_the_sequential_walk(kind: str) -> None:
    deepest = 0
    for seed in range(BATCHES):
        batch = Batch(seed, kind)
        one, other = batch.metadata(), batch.metadata()
        expected, found = batch.sequential(one), batch.on_device(other)
        assert (found.tokens, found.paths) == (expected.tokens, expected.paths)
        for request, generator in one.generators.items():  # left where it would have been
            assert torch.equal(generator.get_state(), other.generators[request].get_state())
        deepest = max(deepest, *map(len, found.paths))
    assert deepest >= 4


def test_noise_of_its_own_at_every_node_draws_other_tokens(monkeypatch: Any) -> None:
    """The control: the law is the same, the tokens are not those of the sequential walk."""
    fresh = torch.Generator(DEVICE).manual_seed(1)
    monkeypatch.setattr(
        module,
        "_share",
        lambda noise, requests: noise.index_select(0, requests).exponential_(generator=fresh),
    )
    batches = [Batch(seed, "seeded") for seed in range(20)]
    assert any(
        b.on_device(b.metadata()).tokens != b.sequential(b.metadata()).tokens for b in batches
    )


def test_generators_that_are_not_rewound_are_seen(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_rewind", lambda generator, state: None)
    different = False
    for seed in range(10):
        batch = Batch(seed, "seeded")
        one, other = batch.metadata(), batch.metadata()
        batch.sequential(one)
        batch.on_device(other)
        different |= any(
            not torch.equal(g.get_state(), other.generators[r].get_state())
            for r, g in one.generators.items()
        )
    assert different


def test_rows_in_small_chunks(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 2 * VOCAB)
    batch = Batch(7, "mixed")
    assert batch.on_device(batch.metadata()).tokens == batch.sequential(batch.metadata()).tokens


class NoSync(TorchDispatchMode):
    """Fails on operations whose result the host must read before it can go on."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in self.WAITING), func
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device() -> None:
    batch = Batch(11, "mixed")  # an odd seed: top-p, whose code path waits on no machine
    with NoSync():
        DeviceWalk(batch.logits, batch.metadata(), batch.trees, batch.starts)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
        bool(batch.logits.any())  # the control
