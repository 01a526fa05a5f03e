# SPDX-License-Identifier: Apache-2.0
"""Drafts retrieved from a datastore (REST, arXiv 2311.08252; the retrieval part of RASD).

The longest suffix of the context, between `_SHORTEST` and `_LONGEST` tokens, that occurs in the
corpus selects a range of the suffix array; the next tokens of a sample of that range are the
candidates, with the sample's frequencies as probabilities. A drafted token narrows the range.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from proposers.datastore import Datastore
from proposers.source import Candidates, VerifiedRows

_LONGEST, _SHORTEST = 16, 2
_SAMPLE = 32

_Context: TypeAlias = tuple[int, int, int]
"""First and last+1 suffix of the range, and how many tokens they share; 0 tokens: no match."""

_NO_MATCH: _Context = (0, 0, 0)


class DatastoreSource:
    """Continuations of the context's last tokens in a corpus.

    Args:
        store: the corpus.
        vocab_size: tokens outside it are never drafted.
    """

    def __init__(self, store: Datastore, vocab_size: int) -> None:
        self._store = store
        self._width = store.header.width
        self._vocab_size = vocab_size
        self._requests: dict[str, tuple[list[int], _Context]] = {}

    def start(
        self, request: str, tokens: Sequence[int], *, greedy: bool, namespace: int = 0
    ) -> None:
        """Begin a request; see `Source.start`."""
        tail = [int(token) for token in tokens[-_LONGEST:]]
        self._requests[request] = tail, self._match(tail, len(tail))

    def extend(self, request: str, tokens: Sequence[int]) -> None:
        """Append committed tokens."""
        tail, (_, _, length) = self._requests[request]
        tail = (tail + [int(token) for token in tokens])[-_LONGEST:]
        # A suffix that matches now matched before the new tokens, too, if only with one token.
        bound = max(length, _SHORTEST - 1) + len(tokens)
        self._requests[request] = tail, self._match(tail, bound)

    def stop(self, request: str) -> None:
        """Forget a request; unknown ones are ignored."""
        self._requests.pop(request, None)

    def observe(self, rows: VerifiedRows) -> None:
        """Nothing to learn: the corpus is fixed."""

    def root(self, request: str) -> _Context:
        """The committed context."""
        return self._requests[request][1]

    def advance(self, state: _Context, token: int) -> _Context:
        """The context after one more token; no shorter match is looked for below a tree's root."""
        low, high, length = state
        pattern = self._store.encode([token]) if length else None
        if pattern is None:
            return _NO_MATCH
        low, high = self._store.find(pattern, low, high, length * self._width)
        return (low, high, length + 1) if low < high else _NO_MATCH

    def candidates(self, state: _Context) -> tuple[int, Candidates]:
        """A bucket by the length of the match and by how often it occurs; 0 without a match."""
        low, high, length = state
        if not length:
            return 0, {}
        following = self._store.following(low, high, length * self._width, _SAMPLE)
        following = [token for token in following if token < self._vocab_size]
        if not following:
            return 0, {}
        share = 1.0 / len(following)
        found: Candidates = {}
        for token in following:
            found[token] = found.get(token, 0.0) + share
        often = high - low >= 4
        return (1 if length < 3 else 2 if length < 5 else 3 if length < 9 else 4) + 4 * often, found

    def prior(self, bucket: int, greedy: bool) -> float:
        """See `Source.prior`."""
        odds = (0.0, 0.1, 0.2, 0.5, 1.5, 0.2, 0.35, 0.8, 2.0)[bucket]
        return odds if greedy else 0.5 * odds

    def _match(self, tail: list[int], longest: int) -> _Context:
        """The longest suffix of `tail` in the corpus, of at most `longest` tokens.

        If a suffix occurs, so do all shorter ones: a binary search over lengths.
        """
        best = _NO_MATCH
        low, high = _SHORTEST, min(longest, len(tail), _LONGEST)
        while low <= high:
            length = (low + high + 1) // 2
            pattern = self._store.encode(tail[-length:])
            first = last = 0
            if pattern is not None:
                first, last = self._store.find(pattern, 0, len(self._store))
            if first < last:
                best = (first, last, length)
                low = length + 1
            else:
                high = length - 1
        return best
