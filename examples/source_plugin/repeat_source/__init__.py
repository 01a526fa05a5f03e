# SPDX-License-Identifier: Apache-2.0
"""A source in a package of its own: text that alternates ("a, b, a, b") goes on alternating."""

from __future__ import annotations

from collections.abc import Sequence

from proposers.registry import SourceContext
from proposers.source import Candidates, VerifiedRows

Context = tuple[int, int]
"""The last two tokens: all that this source looks at."""


class RepeatSource:
    """Drafts the token before the last one."""

    def __init__(self, context: SourceContext) -> None:
        self._vocab_size = context.vocab_size
        self._requests: dict[str, Context] = {}

    def start(
        self, request: str, tokens: Sequence[int], *, greedy: bool, namespace: int = 0
    ) -> None:
        """Begin a request with its prompt and what it has generated."""
        self._requests[request] = (-1, -1)
        self.extend(request, tokens)

    def extend(self, request: str, tokens: Sequence[int]) -> None:
        """Append tokens that were committed."""
        before, last = [*self._requests[request], *tokens[-2:]][-2:]
        self._requests[request] = (int(before), int(last))

    def stop(self, request: str) -> None:
        """Forget a request; unknown ones are ignored."""
        self._requests.pop(request, None)

    def observe(self, rows: VerifiedRows) -> None:
        """The target's own candidates: this source does not learn."""

    def root(self, request: str) -> Context:
        """The context that a tree begins in."""
        return self._requests[request]

    def advance(self, state: Context, token: int) -> Context:
        """The context after a drafted token."""
        return state[1], token

    def candidates(self, state: Context) -> tuple[int, Candidates]:
        """A bucket (how sure, in the source's own terms) and the tokens with probabilities."""
        before, last = state
        if not 0 <= before < self._vocab_size or before == last:
            return 0, {}
        return 1, {before: 1.0}

    def prior(self, bucket: int, greedy: bool) -> float:
        """Odds that it is right, before the mixture has seen it succeed or fail."""
        return 0.05 if bucket else 0.0
