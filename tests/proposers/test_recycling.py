# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proposers import BigramRecycling, TrigramRecycling, VerifiedRows
from proposers.merging import WIDTH, merge_topk

Row = tuple[tuple[int, int], dict[int, float], int]


def verified(rows: list[Row], width: int = WIDTH) -> VerifiedRows:
    ids = np.zeros((len(rows), width), np.int64)
    probs = np.zeros((len(rows), width), np.float32)
    for i, (_, successors, _) in enumerate(rows):
        for k, (token, prob) in enumerate(list(successors.items())[:width]):
            ids[i, k], probs[i, k] = token, prob
    return VerifiedRows(
        np.array([context for context, _, _ in rows], np.int64).reshape(-1, 2),
        ids,
        probs,
        np.array([namespace for _, _, namespace in rows], np.int64),
    )


def blend(old: dict[int, float], new: dict[int, float], decay: float) -> dict[int, float]:
    """The update rule, one token at a time; of equals the fresh ones come first."""
    if not old:
        decay = 1.0
    both = {t: (1 - decay) * old.get(t, 0.0) + decay * new.get(t, 0.0) for t in [*new, *old]}
    best = sorted(both, key=lambda t: -both[t])[:WIDTH]
    return {t: both[t] for t in best if both[t] > 0}


# Binary fractions: with a decay of 1/2 float32 is exact, so that even ties must agree.
successors = st.dictionaries(
    st.integers(0, 40), st.integers(20, 120).map(lambda n: n / 1024), min_size=1, max_size=WIDTH
)


@given(st.lists(successors, min_size=1, max_size=6), st.sampled_from([0.5, 1.0]))
def test_merge_equals_the_slow_rule(history: list[dict[int, float]], decay: float) -> None:
    ids = np.zeros((1, WIDTH), np.int32)
    probs = np.zeros((1, WIDTH), np.float32)
    expected: dict[int, float] = {}
    for new in history:
        rows = verified([((0, 1), new, 0)])
        ids, probs = merge_topk(ids, probs, rows.top_ids.astype(np.int32), rows.top_probs, decay)
        expected = blend(expected, new, decay)
        kept = [(t, p) for t, p in zip(ids[0].tolist(), probs[0].tolist(), strict=True) if p > 0]
        assert kept == list(expected.items())


contexts = st.tuples(st.integers(-1, 3), st.integers(0, 3))
steps = st.lists(
    st.lists(st.tuples(contexts, successors, st.integers(0, 1)), max_size=12), max_size=5
)


@settings(deadline=None)
@given(steps)
@example([[((0, 0), {0: 20 / 1024}, 0)], [((0, 0), {1: 20 / 1024}, 0)]])  # none is worth drafting
def test_tables_follow_the_last_row_of_every_context(history: list[list[Row]]) -> None:
    bigram, trigram = BigramRecycling(100), TrigramRecycling(100)
    slow: dict[tuple[int, ...], dict[int, float]] = {}
    for rows in history:
        last: dict[tuple[int, ...], dict[int, float]] = {}
        for (before, token), new, namespace in rows:
            last[namespace, token] = new
            if before >= 0:
                last[namespace, before, token] = new
        for key, new in last.items():
            slow[key] = blend(slow.get(key, {}), new, 0.5)
        for source in (bigram, trigram):
            source.observe(verified(rows))
    for namespace in (0, 1):
        for before in range(-1, 4):
            for token in range(4):
                for source, key in (
                    (bigram, (namespace, token)),
                    (trigram, (namespace, before, token)),
                ):
                    source.start("r", [before, token], greedy=True, namespace=namespace)
                    bucket, found = source.candidates(source.root("r"))
                    expected = slow.get(key, {}) if before >= 0 or source is bigram else {}
                    worth = {t: p for t, p in expected.items() if p > 0.01}
                    assert bucket == (1 if worth else 0)
                    assert found == worth


def test_states_advance_along_a_path_without_touching_the_request() -> None:
    source = TrigramRecycling(10)
    source.observe(verified([((1, 2), {3: 0.9}, 0), ((2, 3), {4: 0.8}, 0)]))
    source.start("r", [0, 1], greedy=True)
    state = source.advance(source.root("r"), 2)
    assert source.candidates(state) == (1, {3: pytest.approx(0.9)})
    assert source.candidates(source.advance(state, 3)) == (1, {4: pytest.approx(0.8)})
    assert source.candidates(source.root("r")) == (0, {})
    source.extend("r", [2])
    assert source.candidates(source.root("r")) == (1, {3: pytest.approx(0.9)})
    source.stop("r")
    source.stop("r")


def test_the_oldest_context_is_evicted_and_leaves_no_trace() -> None:
    source = BigramRecycling(2)

    def known(token: int) -> dict[int, float]:
        source.start("r", [token], greedy=True)
        return source.candidates(source.root("r"))[1]

    source.observe(verified([((0, 1), {5: 0.9}, 0), ((0, 2), {6: 0.9}, 0)]))
    source.observe(verified([((0, 3), {7: 0.8}, 0)]))
    assert known(1) == {}
    assert known(2) == {6: pytest.approx(0.9)}
    assert known(3) == {7: pytest.approx(0.8)}
    source.observe(verified([((0, t), {t: 0.5}, 0) for t in range(10, 17)]))
    assert [t for t in range(20) if known(t)] == [15, 16]


def test_namespaces_are_apart_and_bounded() -> None:
    source = BigramRecycling(10, max_namespaces=2)
    for namespace in (1, 2, 3):
        source.observe(verified([((0, 1), {namespace: 0.9}, namespace)]))
    found = {}
    for namespace in (3, 2, 1):
        source.start("r", [1], greedy=True, namespace=namespace)
        found[namespace] = source.candidates(source.root("r"))[1]
    assert found == {3: {3: pytest.approx(0.9)}, 2: {2: pytest.approx(0.9)}, 1: {}}


def test_wide_and_narrow_rows() -> None:
    source = BigramRecycling(10)
    source.observe(verified([((0, 1), dict.fromkeys(range(12), 0.05), 0)], width=12))
    source.observe(verified([((0, 1), {3: 0.6}, 0)], width=1))
    source.start("r", [1], greedy=True)
    found = source.candidates(source.root("r"))[1]
    assert len(found) == WIDTH
    assert found[3] == pytest.approx(0.325)


@pytest.mark.parametrize("bad", [{"capacity": 0}, {"decay": 0.0}, {"decay": 1.5}])
def test_bad_arguments_are_refused(bad: dict[str, float]) -> None:
    arguments: dict[str, float] = {"capacity": 4, **bad}
    capacity = int(arguments.pop("capacity"))
    with pytest.raises(ValueError, match=next(iter(bad))):
        TrigramRecycling(capacity, **arguments)
