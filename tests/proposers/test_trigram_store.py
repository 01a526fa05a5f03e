# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from proposers import VerifiedRows
from proposers.trigram_store import CAP, RATE, WIDTH, TrigramStore

VOCAB = 60


def after(store: TrigramStore, *tokens: int) -> dict[int, float]:
    state = store.root("r")
    for token in tokens:
        state = store.advance(state, token)
    return store.candidates(state)[1]


def test_counts_the_text() -> None:
    store = TrigramStore(VOCAB)
    store.start("r", [1, 2, 3, 1, 2, 4, 1, 2, 3], greedy=True)
    found = after(store, 1, 2)
    assert found[3] == pytest.approx(2 * found[4])
    assert sum(found.values()) < 1
    store.extend("r", [1, 2, 4, 1, 2, 4])
    assert max(after(store, 1, 2), key=after(store, 1, 2).__getitem__) == 4
    assert after(store, 2, 1) == {}


def test_learns_the_targets_candidates() -> None:
    store = TrigramStore(VOCAB)
    store.start("r", [8, 9], greedy=True)
    assert after(store) == {}
    rows = VerifiedRows(
        np.array([[8, 9], [-1, 9]], np.int64),
        np.array([[5, 6], [7, 7]], np.int64),
        np.array([[0.7, 0.01], [0.9, 0.0]], np.float32),
        np.zeros(2, np.int64),
    )
    store.observe(rows)
    assert set(after(store)) == {5}


def test_weights_are_capped_and_successors_limited() -> None:
    store = TrigramStore(VOCAB)
    store.start("r", [1, 2, 3] * int(2 * CAP / RATE), greedy=True)
    store.extend("r", [t for c in range(10, 40) for t in (1, 2, c)])
    weights = store._stores[0][1, 2]
    assert weights[3] == CAP
    assert len(weights) == WIDTH


def test_the_oldest_pairs_go_first() -> None:
    store = TrigramStore(VOCAB, capacity=3)
    store.start("r", [1, 2, 3, 4, 5, 6], greedy=True)
    assert after(store, 1, 2) == {}
    assert set(after(store, 4, 5)) == {6}


def test_namespaces_are_apart() -> None:
    store = TrigramStore(VOCAB, max_namespaces=2)
    store.start("r", [1, 2, 3], greedy=True)
    store.start("s", [1, 2], greedy=True, namespace=1)
    assert store.candidates(store.root("s")) == (0, {})
    store.start("t", [1, 2], greedy=True, namespace=2)
    assert len(store._stores) == 2
    with pytest.raises(ValueError, match="capacity=0"):
        TrigramStore(VOCAB, capacity=0)
