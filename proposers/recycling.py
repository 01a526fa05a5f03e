# SPDX-License-Identifier: Apache-2.0
"""Token Recycling (arXiv 2408.08696): the target's own top-k, kept as an adjacency table.

Every verified row says which tokens the target finds likely after a context. The table is keyed by
the last token (`BigramRecycling`, the paper's adjacency matrix) or by the last two
(`TrigramRecycling`), and later visits of the same context draft from it. In place of the paper's
overwriting, probabilities decay:

    p(t | c) <- (1 - decay) * p(t | c) + decay * p_target(t)

and the `WIDTH` largest are kept; the first visit of a context stores the target's values as they
are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from proposers.merging import WIDTH, compiled, merge_rows
from proposers.prime import PrimeTable
from proposers.source import Candidates, VerifiedRows

NEGLIGIBLE = 0.01
"""Successors up to this probability are not drafted: they never pay for a row."""


class _Table:
    """Successors by context key; oldest keys are overwritten when `capacity` is reached."""

    def __init__(self, capacity: int, negligible: float) -> None:
        self._negligible = negligible
        # np.zeros maps pages on first use: a table costs memory only for the contexts it has seen.
        self.ids = np.zeros((capacity, WIDTH), np.int32)
        self.probs = np.zeros((capacity, WIDTH), np.float32)
        self._worth = np.zeros(capacity, np.int8)  # how many successors are not negligible
        self._capacity = capacity
        self._slot_of: dict[int, int] = {}
        self._key_of: list[int] = []
        self._next = 0

    def update(self, row_of: dict[int, int], rows: VerifiedRows, decay: float) -> None:
        """Merge in the rows that `row_of` names by key."""
        # A slot claimed twice (more contexts in one step than capacity) keeps its last claim.
        claimed = {self._claim(key): row for key, row in row_of.items()}
        slots, rows_at = np.array([*claimed.items()], np.int64).T.copy()
        merge_rows(self.ids, self.probs, slots, rows_at, rows.top_ids, rows.top_probs, decay)
        self._worth[slots] = (self.probs[slots] > self._negligible).sum(axis=1)

    def successors(self, key: int) -> Candidates:
        slot = self._slot_of.get(key)
        if slot is None:
            return {}
        n = self._worth.item(slot)
        return dict(zip(self.ids[slot, :n].tolist(), self.probs[slot, :n].tolist()))  # noqa: B905

    def _claim(self, key: int) -> int:
        slot = self._slot_of.get(key)
        if slot is not None:
            return slot
        slot = self._next
        self._next = (slot + 1) % self._capacity
        if slot < len(self._key_of):
            del self._slot_of[self._key_of[slot]]
            self._key_of[slot] = key
            self.probs[slot] = 0.0
            self._worth[slot] = 0
        else:
            self._key_of.append(key)
        self._slot_of[key] = slot
        return slot


_Context: TypeAlias = tuple[_Table, int, int]
"""A table and a context's last two tokens; a plain tuple, because every tree node makes one."""


class _Recycling(ABC):
    """What both keyings share: tables per namespace, and the last two tokens per request."""

    def __init__(
        self,
        capacity: int,
        *,
        decay: float = 0.5,
        max_namespaces: int = 8,
        negligible: float = NEGLIGIBLE,
    ) -> None:
        if capacity < 1 or max_namespaces < 1:
            raise ValueError(
                f"recycling: capacity={capacity}, max_namespaces={max_namespaces}; "
                "both must be at least 1"
            )
        if not 0.0 < decay <= 1.0:
            raise ValueError(f"recycling: decay={decay}; it must be in (0, 1]")
        compiled()  # now, and not in the first step
        self._capacity = capacity
        self._decay = decay
        self._max_namespaces = max_namespaces
        self._negligible = negligible
        self._tables: OrderedDict[int, _Table] = OrderedDict()
        self._requests: dict[str, _Context] = {}

    def start(
        self, request: str, tokens: Sequence[int], *, greedy: bool, namespace: int = 0
    ) -> None:
        """Begin a request; see `Source.start`."""
        self._requests[request] = _after((self._table(namespace), -1, -1), tokens)

    def extend(self, request: str, tokens: Sequence[int]) -> None:
        """Append committed tokens."""
        self._requests[request] = _after(self._requests[request], tokens)

    def stop(self, request: str) -> None:
        """Forget a request; unknown ones are ignored."""
        self._requests.pop(request, None)

    def observe(self, rows: VerifiedRows) -> None:
        """Merge the rows into the tables; of rows that share a context the last one counts."""
        by_namespace: dict[int, dict[int, int]] = {}
        keys = [self._key(before, last) for before, last in rows.contexts.tolist()]
        for row, (key, namespace) in enumerate(zip(keys, rows.namespaces.tolist(), strict=True)):
            if key >= 0:
                by_namespace.setdefault(namespace, {})[key] = row
        for namespace, row_of in by_namespace.items():
            self._table(namespace).update(row_of, rows, self._decay)

    def root(self, request: str) -> _Context:
        """The committed context."""
        return self._requests[request]

    def advance(self, state: _Context, token: int) -> _Context:
        """The context after one more token."""
        return state[0], state[2], token

    def candidates(self, state: _Context) -> tuple[int, Candidates]:
        """Bucket 1 if the context has successors worth drafting, else 0; and these."""
        table, before, last = state
        found = table.successors(self._key(before, last))
        return (1 if found else 0), found

    @abstractmethod
    def prior(self, bucket: int, greedy: bool) -> float:
        """See `Source.prior`."""

    @abstractmethod
    def _key(self, before: int, last: int) -> int:
        """The table's key of a context; negative: the context has none."""

    def _new_table(self) -> _Table:
        return _Table(self._capacity, self._negligible)

    def _table(self, namespace: int) -> _Table:
        table = self._tables.get(namespace)
        if table is None:
            table = self._tables[namespace] = self._new_table()
            if len(self._tables) > self._max_namespaces:
                self._tables.popitem(last=False)
        self._tables.move_to_end(namespace)
        return table


def _after(context: _Context, tokens: Sequence[int]) -> _Context:
    table, *old = context
    before, last = [*old, *tokens[-2:]][-2:]
    return table, before, last


class BigramRecycling(_Recycling):
    """Successors of the last token.

    Args:
        capacity: contexts kept per namespace (64 bytes each); the vocabulary size keeps all.
        decay: weight of a fresh row against the stored ones.
        max_namespaces: tables kept; the least recently used one is dropped first.
        negligible: successors up to this probability are not drafted.
        prime: what the tables hold at first; observations are blended in as into any other row.

    Raises:
        ValueError: for a capacity or a number of namespaces below 1, or a decay not in (0, 1].
    """

    def __init__(
        self,
        capacity: int,
        *,
        decay: float = 0.5,
        max_namespaces: int = 8,
        negligible: float = NEGLIGIBLE,
        prime: PrimeTable | None = None,
    ) -> None:
        super().__init__(
            capacity, decay=decay, max_namespaces=max_namespaces, negligible=negligible
        )
        self._prime = prime

    def prior(self, bucket: int, greedy: bool) -> float:
        """See `Source.prior`."""
        return 0.8 if bucket else 0.0

    def _key(self, before: int, last: int) -> int:
        return last

    def _new_table(self) -> _Table:
        table = super()._new_table()
        prime = self._prime
        if prime is not None:
            rows = VerifiedRows(
                np.stack([np.full(len(prime), -1), prime.tokens], axis=1).astype(np.int64),
                prime.ids.astype(np.int64),
                prime.probs,
                np.zeros(len(prime), np.int64),
            )
            table.update({token: i for i, token in enumerate(prime.tokens.tolist())}, rows, 1.0)
        return table


class TrigramRecycling(_Recycling):
    """Successors of the last two tokens; the arguments are those of `BigramRecycling`."""

    def prior(self, bucket: int, greedy: bool) -> float:
        """See `Source.prior`."""
        return (2.0 if greedy else 1.4) if bucket else 0.0

    def _key(self, before: int, last: int) -> int:
        return before << 32 | last if before >= 0 and last >= 0 else -1
