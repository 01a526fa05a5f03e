# SPDX-License-Identifier: Apache-2.0
"""Drafting time per step on a toy language; run as a script it prints a table.

The budgets are 0.4 ms for one request and 1.5 ms for a batch of eight with trees of eight nodes.
The test asserts five times as much, in CPU time, because test machines are slow and shared.
"""

from __future__ import annotations

import time

import numpy as np
import pytest

from proposers import CostModel, DySpecOptions, TreeDrafter, VerifiedRows

VOCAB = 49_152
WORDS = 400


class Language:
    """A Markov chain over WORDS tokens with eight successors each."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.ids = np.stack([self.rng.permutation(WORDS)[:8] for _ in range(WORDS)])
        probs = np.sort(self.rng.dirichlet(np.full(8, 0.5), WORDS), axis=1)[:, ::-1]
        self.probs = probs.astype(np.float32)

    def next(self, token: int) -> int:
        law = self.probs[token].astype(np.float64)
        return int(self.ids[token, self.rng.choice(8, p=law / law.sum())])


def measure(batch: int, steps: int, prior: list[tuple[int, float]]) -> dict[str, float]:
    """CPU seconds per step of the three calls and of their sum, and nodes per request.

    The seconds are 20th percentiles: other processes only ever add to them.
    """
    language = Language(seed=0)
    drafter = TreeDrafter(VOCAB, DySpecOptions(max_nodes=8), CostModel(prior))
    # A warm table: trees are full from the first step.
    everything = np.stack([np.full(WORDS, -1), np.arange(WORDS)], axis=1)
    drafter.observe(
        VerifiedRows(everything, language.ids, language.probs, np.zeros(WORDS, np.int64))
    )
    names = [str(i) for i in range(batch)]
    texts = []
    for name in names:
        text = [int(language.rng.integers(WORDS))]
        while len(text) < 300:
            text.append(language.next(text[-1]))
        texts.append(text)
        drafter.start(name, text, greedy=True)
    trees = drafter.propose(names)
    seconds: dict[str, list[float]] = {"observe": [], "extend": [], "propose": [], "total": []}
    nodes = 0
    for _ in range(steps):
        contexts, emitted = [], []
        for text, tree in zip(texts, trees, strict=True):
            nodes += len(tree)
            contexts.append((text[-2], text[-1]))
            before = [tree.tokens[p] if p >= 0 else text[-1] for p in tree.parents]
            contexts.extend(zip(before, tree.tokens, strict=True))
            children, node = tree.children, -1
            out = [language.next(text[-1])]
            while out[-1] in children[node]:
                node = children[node][out[-1]]
                out.append(language.next(out[-1]))
            emitted.append(out)
        last = [token for _, token in contexts]
        rows = VerifiedRows(
            np.array(contexts, np.int64),
            language.ids[last],
            language.probs[last],
            np.zeros(len(last), np.int64),
        )
        times = [time.process_time()]
        drafter.observe(rows)
        times.append(time.process_time())
        for name, out in zip(names, emitted, strict=True):
            drafter.extend(name, out)
        times.append(time.process_time())
        trees = drafter.propose(names)
        times.append(time.process_time())
        for text, out in zip(texts, emitted, strict=True):
            text.extend(out)
        for key, spent in zip(seconds, [*np.diff(times), times[-1] - times[0]], strict=True):
            seconds[key].append(float(spent))
    result = {key: float(np.quantile(values, 0.2)) for key, values in seconds.items()}
    result["nodes"] = nodes / steps / batch
    return result


@pytest.mark.parametrize(("batch", "budget"), [(1, 0.4e-3), (8, 1.5e-3)])
def test_drafting_time(batch: int, budget: float) -> None:
    result = measure(batch, steps=60, prior=[(1, 0.03), (1000, 0.0301)])
    assert result["nodes"] > 5  # otherwise the time says nothing
    assert result["total"] < 5 * budget


if __name__ == "__main__":
    curves = {
        "rows free": [(1, 0.03), (1000, 0.0301)],
        "rows at 0.6 ms": [(1, 0.0325), (7, 0.037), (17, 0.056), (65, 0.145)],
    }
    for label, prior in curves.items():
        for batch in (1, 8):
            result = measure(batch, 300, prior)
            parts = " ".join(
                f"{key} {value * 1e6:.0f} us" for key, value in result.items() if key != "nodes"
            )
            print(f"{label}, batch {batch}: {result['nodes']:.1f} nodes per request, {parts}")
