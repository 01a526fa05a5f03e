# SPDX-License-Identifier: Apache-2.0
"""Drafts copied from the request's own text, where its last tokens have occurred before.

Prompt lookup takes the continuation of one earlier occurrence; as in SuffixDecoding
(arXiv 2411.04975) several occurrences vote here, so that the draft can branch. With matches at
positions i whose preceding m_i tokens agree with the context,

    p(t) = sum_i [x_i = t] * 4^m_i / sum_i 4^m_i

where x_i is the token at position i: a longer match outweighs several shorter ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from proposers.source import Candidates, VerifiedRows

_ORDERS = (4, 2, 1)
"""Lengths of the indexed n-grams, longest first: long ones find the rare, good match at once."""

_BASE = 4.0
_NEGLIGIBLE = 3
"""A match this much shorter than the longest carries under 2% of its weight: not looked up."""


class History:
    """A growing text: its tokens, and for each n-gram order the chain of its earlier occurrences.

    ``previous[k][i]`` is the last position before i that is preceded by the same
    ``_ORDERS[k]``-gram as position i (-1: none); position i is that of token i, and the position
    after the last token stands for the token to come.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self.previous: list[list[int]] = [[-1] for _ in _ORDERS]
        self._latest: list[dict[tuple[int, ...], int]] = [{} for _ in _ORDERS]
        self.append(tokens)

    def append(self, tokens: Sequence[int]) -> None:
        """Take more tokens at the end."""
        old = len(self.tokens)
        self.tokens.extend(map(int, tokens))  # NumPy integers must not reach a tree
        text, end = self.tokens, len(self.tokens)
        for order, latest, previous in zip(_ORDERS, self._latest, self.previous, strict=True):
            for position in range(old + 1, end + 1):
                if position < order:
                    previous.append(-1)
                    continue
                gram = tuple(text[position - order : position])
                previous.append(latest.get(gram, -1))
                latest[gram] = position

    def before_end(self, gram: tuple[int, ...], k: int) -> int:
        """The last position preceded by `gram` that has a token, or -1; k indexes `_ORDERS`."""
        position = self._latest[k].get(gram, -1)
        return self.previous[k][position] if position == len(self.tokens) else position


Context: TypeAlias = tuple[History, int, list[tuple[int, int]], int]
"""History, last token, matches and the longest match's length; a plain tuple, because every tree
node makes one. A match is (position, length of the agreement before it); positions are distinct."""


class SuffixSource:
    """Continuations of earlier occurrences of a context's last tokens in the same request.

    Args:
        vocab_size: tokens outside it are never drafted.
        max_matches: occurrences that vote in one context; this bounds the work per node.
        max_length: matches are not followed further back than this.
        window: tokens of a prompt that are indexed, counted from its end (about 0.5 kB each).

    Raises:
        ValueError: if a limit is too small, saying which one and what is allowed.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        max_matches: int = 8,
        max_length: int = 12,
        window: int = 32768,
    ) -> None:
        if max_matches < 1 or window < 1 or max_length < _ORDERS[0]:
            raise ValueError(
                f"suffix: max_matches={max_matches}, max_length={max_length}, window={window}; "
                f"max_length must be at least {_ORDERS[0]}, the others at least 1"
            )
        self._vocab_size = vocab_size
        self._max_matches = max_matches
        self._max_length = max_length
        self._window = window
        self._weights = [_BASE**m for m in range(max_length + 1)]
        self._requests: dict[str, History] = {}

    def start(
        self, request: str, tokens: Sequence[int], *, greedy: bool, namespace: int = 0
    ) -> None:
        """Begin a request; see `Source.start`."""
        self._requests[request] = History(tokens[-self._window :])

    def extend(self, request: str, tokens: Sequence[int]) -> None:
        """Append committed tokens."""
        self._requests[request].append(tokens)

    def stop(self, request: str) -> None:
        """Forget a request; unknown ones are ignored."""
        self._requests.pop(request, None)

    def observe(self, rows: VerifiedRows) -> None:
        """Nothing to learn: the target's alternatives are not text."""

    def root(self, request: str) -> Context:
        """The committed context."""
        history = self._requests[request]
        return self.match(history, history.tokens[-self._max_length :])

    def match(self, history: History, tail: Sequence[int]) -> Context:
        """The state of a context in any text.

        Args:
            history: the text to copy from.
            tail: the last tokens of the context (all of them where it is short), which may or may
                not be the end of `history`.
        """
        text = history.tokens
        lengths: dict[int, int] = {}
        longest = 0
        bound = self._max_length
        for k, order in enumerate(_ORDERS):
            # What only this order finds is shorter than the order before it.
            if longest - bound >= _NEGLIGIBLE or len(lengths) >= self._max_matches:
                break
            bound = order - 1
            if order > len(tail):
                continue
            previous = history.previous[k]
            position = history.before_end(tuple(tail[-order:]), k)
            for _ in range(self._max_matches):
                if position < 0:
                    break
                if position not in lengths:
                    length = self._agreement(text, position, tail, order)
                    lengths[position] = length
                    longest = max(longest, length)
                position = previous[position]
        return history, (tail[-1] if tail else -1), list(lengths.items()), longest

    def advance(self, state: Context, token: int) -> Context:
        """The context after one more token."""
        history, last, matches, _ = state
        text, top, room = history.tokens, self._max_length, self._max_matches
        last_position = len(text) - 2
        moved = []
        longest = 0
        for position, length in matches:
            if text[position] == token and position <= last_position:
                length = length + 1 if length < top else top
                moved.append((position + 1, length))
                if length > longest:
                    longest = length
        # Matches that begin at or just before this token are not among the parent's.
        for k, gram in ((1, (last, token)), (2, (token,))):
            length = _ORDERS[k]
            if longest - length >= _NEGLIGIBLE:
                break
            position = history.before_end(gram, k)
            previous = history.previous[k]
            known = {found for found, _ in moved}
            for _ in range(room):
                if position < 0 or len(moved) >= room:
                    break
                if position not in known:
                    moved.append((position, length))
                    longest = max(longest, length)
                position = previous[position]
        return history, token, moved, longest

    def candidates(self, state: Context) -> tuple[int, Candidates]:
        """The bucket of the longest match (0: none), and the continuations."""
        history, _, matches, longest = state
        text, weights = history.tokens, self._weights
        mass: dict[int, float] = {}
        total = 0.0
        for position, length in matches:
            token, weight = text[position], weights[length]
            mass[token] = mass.get(token, 0.0) + weight
            total += weight
        vocab_size = self._vocab_size
        found = {token: w / total for token, w in mass.items() if 0 <= token < vocab_size}
        return (_bucket(longest) if found else 0), found

    def prior(self, bucket: int, greedy: bool) -> float:
        """See `Source.prior`."""
        return (_ODDS_GREEDY if greedy else _ODDS_SAMPLED)[bucket]

    def _agreement(self, text: list[int], position: int, tail: Sequence[int], known: int) -> int:
        """How many tokens before `position` equal those at the end of `tail` (>= `known`)."""
        length = known
        limit = min(self._max_length, position, len(tail))
        while length < limit and text[position - 1 - length] == tail[-1 - length]:
            length += 1
        return length


# By bucket; rough, from a 135M chat model: the mixture corrects them within tens of tokens.
_ODDS_GREEDY = (0.0, 0.25, 0.6, 1.3, 2.0, 4.0, 6.0)
_ODDS_SAMPLED = (0.0, 0.1, 0.2, 0.4, 0.7, 1.2, 2.0)


def _bucket(longest: int) -> int:
    if longest <= 3:
        return longest
    return 4 if longest <= 5 else 5 if longest <= 8 else 6
