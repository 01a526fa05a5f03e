# SPDX-License-Identifier: Apache-2.0
"""Aggressive decoding (arXiv 2205.10350): answers that rewrite their input draft from the input.

A pointer i into the prompt says where the copy is. While the answer follows the prompt the draft is
x_i, x_{i+1}, ... At a mismatch the paper decodes on and looks for the answer's last tokens in the
input to set the pointer anew. An edit mostly replaces or inserts a few tokens, so here the pointer
is not lost at once: g tokens after it was left, the copy is expected to go on with x_{i+g} (as many
tokens replaced) or with x_i (inserted), which no suffix match can know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from proposers.source import Candidates, VerifiedRows

_WINDOW = 32768
"""Tokens of a prompt that are indexed, counted from its end."""

_REACH = 8
"""How far from the place where the copy broke off a single token may take it up again."""

_PATIENCE = 4
"""Tokens after a mismatch during which the copy is expected to go on near the pointer."""

_REPLACED, _INSERTED = 0.6, 0.4


class _Input:
    """A prompt and where each pair of its tokens ends."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = [int(t) for t in tokens[-_WINDOW:]]
        self.after_pair: dict[tuple[int, int], list[int]] = {}
        for i in range(1, len(self.tokens)):
            pair = self.tokens[i - 1], self.tokens[i]
            self.after_pair.setdefault(pair, []).append(i + 1)


_Context: TypeAlias = tuple[_Input, int, int, int, int]
"""Input, last token, pointer (-1: never set), tokens copied since it was set, tokens since it was
left (0: it is on the copy); a plain tuple, because every tree node makes one."""


class CopySource:
    """The input from the pointer on.

    Args:
        vocab_size: tokens outside it are never drafted.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._requests: dict[str, _Context] = {}

    def start(
        self, request: str, tokens: Sequence[int], *, greedy: bool, namespace: int = 0
    ) -> None:
        """Begin a request; see `Source.start`. All tokens but the last one are the input."""
        text = _Input(tokens[:-1])
        last = text.tokens[-1] if text.tokens else -1
        state: _Context = (text, last, -1, 0, 0)
        self._requests[request] = self.advance(state, int(tokens[-1])) if len(tokens) else state

    def extend(self, request: str, tokens: Sequence[int]) -> None:
        """Append committed tokens."""
        state = self._requests[request]
        for token in tokens:
            state = self.advance(state, int(token))
        self._requests[request] = state

    def stop(self, request: str) -> None:
        """Forget a request; unknown ones are ignored."""
        self._requests.pop(request, None)

    def observe(self, rows: VerifiedRows) -> None:
        """Nothing to learn: the input is fixed."""

    def root(self, request: str) -> _Context:
        """The committed context."""
        return self._requests[request]

    def advance(self, state: _Context, token: int) -> _Context:
        """The context after one more token."""
        text, last, pointer, run, left = state
        tokens = text.tokens
        if pointer >= 0 and not left and pointer < len(tokens) and tokens[pointer] == token:
            return text, token, pointer + 1, run + 1, 0
        found = text.after_pair.get((last, token))
        if found is not None:
            # Of several places the nearest to where the copy was, ahead of it rather than behind.
            here = max(pointer, 0)
            return text, token, min(found, key=lambda i: abs(i - here) + (i < here)), 2, 0
        if pointer < 0 or left > _PATIENCE:
            return text, token, -1, 0, 0
        if left:
            for i in range(pointer, min(pointer + _REACH, len(tokens))):
                if tokens[i] == token:
                    return text, token, i + 1, 1, 0
        return text, token, pointer, 0, left + 1

    def candidates(self, state: _Context) -> tuple[int, Candidates]:
        """Bucket 1 to 3 on the copy, by its length; 4 next to it; 0 without a pointer."""
        text, _, pointer, run, left = state
        if pointer < 0:
            return 0, {}
        tokens = text.tokens
        if not left:
            found = {tokens[pointer]: 1.0} if pointer < len(tokens) else {}
            bucket = 1 if run < 4 else 2 if run < 16 else 3
        else:
            found = {}
            for i, share in ((pointer + left, _REPLACED), (pointer, _INSERTED)):
                if i < len(tokens):
                    found[tokens[i]] = found.get(tokens[i], 0.0) + share
            bucket = 4
        found = {t: p for t, p in found.items() if 0 <= t < self._vocab_size}
        return (bucket if found else 0), found

    def prior(self, bucket: int, greedy: bool) -> float:
        """See `Source.prior`."""
        return (0.0, 0.4, 1.5, 4.0, 0.15)[bucket] * (1.0 if greedy else 0.4)
