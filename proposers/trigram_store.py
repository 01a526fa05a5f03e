# SPDX-License-Identifier: Apache-2.0
"""ADED's store (arXiv 2407.12021): weights of token triples, adapted while the text is written.

The store maps a pair of tokens to successors with weights, M[a, b][c]. A corpus may fill it; then
every trigram (a, b, c) of the running text adds

    M[a, b][c] <- min(M[a, b][c] + RATE, CAP)

with the paper's RATE = 0.04 and CAP = 3. The paper's weights need not sum to 1; what is drafted
here is their share, w / (EMPTY + sum of w), where EMPTY stands for successors not seen yet. The
target's own candidates at verified rows are evidence of the same kind and enter with RATE times
their probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from proposers.source import Candidates, VerifiedRows

RATE = 0.04
CAP = 3.0
WIDTH = 12
_EMPTY = 0.02

_Context: TypeAlias = tuple[dict[tuple[int, int], dict[int, float]], int, int]
"""Store and the last two tokens."""


class TrigramStore:
    """Successors of the last two tokens by weight.

    Args:
        vocab_size: tokens outside it are never drafted.
        capacity: pairs kept per namespace (about 1 kB each); the oldest are dropped first.
        max_namespaces: stores kept; the oldest is dropped first.

    Raises:
        ValueError: for a capacity or a number of namespaces below 1.
    """

    def __init__(self, vocab_size: int, *, capacity: int = 2**17, max_namespaces: int = 8) -> None:
        if capacity < 1 or max_namespaces < 1:
            raise ValueError(
                f"trigram store: capacity={capacity}, max_namespaces={max_namespaces}; both must "
                "be at least 1"
            )
        self._vocab_size = vocab_size
        self._capacity = capacity
        self._max_namespaces = max_namespaces
        self._stores: dict[int, dict[tuple[int, int], dict[int, float]]] = {}
        self._requests: dict[str, _Context] = {}

    def start(
        self, request: str, tokens: Sequence[int], *, greedy: bool, namespace: int = 0
    ) -> None:
        """Begin a request; its prompt's trigrams count."""
        self._requests[request] = (self._store(namespace), -1, -1)
        self.extend(request, tokens)

    def extend(self, request: str, tokens: Sequence[int]) -> None:
        """Append committed tokens and count their trigrams."""
        store, before, last = self._requests[request]
        for token in map(int, tokens):
            if before >= 0 and last >= 0:
                self._add(store, (before, last), token, RATE)
            before, last = last, token
        self._requests[request] = store, before, last

    def stop(self, request: str) -> None:
        """Forget a request; unknown ones are ignored."""
        self._requests.pop(request, None)

    def observe(self, rows: VerifiedRows) -> None:
        """Count the target's candidates."""
        listed = zip(
            rows.contexts.tolist(),
            rows.top_ids.tolist(),
            rows.top_probs.tolist(),
            rows.namespaces.tolist(),
            strict=True,
        )
        for (before, last), tokens, probs, namespace in listed:
            if before < 0:
                continue
            store = self._store(namespace)
            for token, prob in zip(tokens, probs, strict=True):
                if prob > 0.05:
                    self._add(store, (before, last), token, RATE * prob)

    def root(self, request: str) -> _Context:
        """The committed context."""
        return self._requests[request]

    def advance(self, state: _Context, token: int) -> _Context:
        """The context after one more token."""
        return state[0], state[2], token

    def candidates(self, state: _Context) -> tuple[int, Candidates]:
        """Bucket 2 for a pair with much evidence, 1 with little, 0 with none."""
        store, before, last = state
        found = store.get((before, last))
        if not found:
            return 0, {}
        total = sum(found.values())
        scale = 1.0 / (total + _EMPTY)
        return (2 if total > 4 * RATE else 1), {
            t: w * scale for t, w in found.items() if 0 <= t < self._vocab_size
        }

    def prior(self, bucket: int, greedy: bool) -> float:
        """See `Source.prior`."""
        return (0.0, 1.0, 1.5)[bucket] * (1.0 if greedy else 0.6)

    def _add(
        self,
        store: dict[tuple[int, int], dict[int, float]],
        pair: tuple[int, int],
        token: int,
        weight: float,
    ) -> None:
        found = store.get(pair)
        if found is None:
            if len(store) >= self._capacity:
                del store[next(iter(store))]  # dicts keep the order of insertion
            store[pair] = {token: weight}
            return
        found[token] = min(found.get(token, 0.0) + weight, CAP)
        if len(found) > WIDTH:
            del found[min(found, key=found.__getitem__)]

    def _store(self, namespace: int) -> dict[tuple[int, int], dict[int, float]]:
        store = self._stores.get(namespace)
        if store is None:
            if len(self._stores) >= self._max_namespaces:
                del self._stores[next(iter(self._stores))]
            store = self._stores[namespace] = {}
        return store
