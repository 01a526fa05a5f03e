# SPDX-License-Identifier: Apache-2.0
"""Memory of the drafters, and of a whole server, under many short requests: flat."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import numpy as np
import pytest

from proposers import CostModel, TreeDrafter, VerifiedRows
from tests.vllm_ext.server import Server
from tests.vllm_ext.test_server import _load
from vllm_ext.build import Resources, build_drafter
from vllm_ext.methods import METHODS, parse_options

VOCAB = 64
FILELESS = ["dyspec", "token_recycling", "aded", "copy", "suffix_tree"]


def drafter(method: str) -> TreeDrafter:
    options = parse_options(METHODS[method], {})
    cost = CostModel([(1, 0.03), (1000, 0.0301)])
    return build_drafter(method, options, Resources(VOCAB), cost)


def serve(drafter: TreeDrafter, requests: range, *, forget: bool = True) -> int:
    """Short requests, four at a time; returns how many containers are alive afterwards."""
    noise = np.random.default_rng(0)
    for first in requests[::4]:
        names = [str(first + i) for i in range(4)]
        for name in names:
            drafter.start(name, noise.integers(VOCAB, size=20).tolist(), greedy=True)
        for _ in range(4):
            trees = drafter.propose(names)
            for name, tree in zip(names, trees, strict=True):
                top = np.argsort(noise.random(VOCAB))[None, :8].astype(np.int64)
                probs = np.full((1, 8), 0.1, np.float32)
                context = noise.integers(VOCAB, size=(1, 2))
                drafter.observe(VerifiedRows(context, top, probs, np.zeros(1, np.int64)))
                drafter.extend(name, [*tree.tokens[:1], int(noise.integers(VOCAB))])
        for name in names:
            if forget:
                drafter.stop(name)
    gc.collect()
    return len(gc.get_objects())


def growth(method: str, count: int, *, forget: bool = True) -> float:
    """Containers per request that the second half of ``count`` requests leaves behind."""
    subject = drafter(method)
    before = serve(subject, range(count // 2))
    return (serve(subject, range(count // 2, count), forget=forget) - before) / (count // 2)


@pytest.mark.parametrize("method", FILELESS)
def test_a_drafter_forgets_its_requests(method: str) -> None:
    assert growth(method, 400) < 0.1


def test_a_request_that_is_never_stopped_shows() -> None:
    """Negative control."""
    assert growth("dyspec", 400, forget=False) > 1


@pytest.mark.slow
@pytest.mark.parametrize("method", FILELESS)
def test_two_thousand_requests_leave_nothing_in_a_drafter(method: str) -> None:
    assert growth(method, 4000) < 0.01


@pytest.mark.engine
@pytest.mark.slow
def test_two_thousand_requests_leave_the_server_flat(server: Server) -> None:
    asyncio.run(_load(server, 200, 16))
    memory: list[Any] = []
    for _ in range(10):
        asyncio.run(_load(server, 200, 16))
        memory.append(server.memory())
    # Least squares over ten readings: one odd reading does not decide.
    per_request = np.polyfit(200.0 * np.arange(10), memory, 1)[0]
    print(f"memory: {[round(m / 2**20, 1) for m in memory]} MiB, {per_request:.0f} bytes a request")
    assert per_request < 8 * 2**10
    assert server.metric("vllm:num_requests_running") == 0
