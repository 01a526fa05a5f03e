# SPDX-License-Identifier: Apache-2.0
"""Jacobi guesses (speculative Jacobi decoding, arXiv 2410.01699) as a source.

Where a drafted token x was rejected and the target emitted b in its place, the target has said what
would follow x. Jacobi iteration keeps that as the guess for the same position: the candidates of
the token after b are the target's top tokens in the row of the best rejected sibling of b,

    p(. | ..., b)  ~  p_target(. | ..., x).

The paper refines a whole window of positions; behind the first one its guesses rest on two wrong
tokens, and this source makes none. The mixture learns what the first one is worth.
"""

from __future__ import annotations

from collections.abc import Sequence

from proposers.source import Candidates, VerifiedRows

_LEAST = 0.02

_Context = tuple[Candidates, int]
"""What is guessed next, and the last token; after a drafted token nothing is guessed."""

_NOTHING: Candidates = {}


class JacobiSource:
    """Guesses for the first token of a step, from rejected rows of the step before."""

    def __init__(self) -> None:
        self._rows: dict[int, list[tuple[int, Candidates]]] = {}
        self._requests: dict[str, _Context] = {}

    def start(
        self, request: str, tokens: Sequence[int], *, greedy: bool, namespace: int = 0
    ) -> None:
        """Begin a request; see `Source.start`."""
        self._requests[request] = _NOTHING, int(tokens[-1]) if len(tokens) else -1

    def extend(self, request: str, tokens: Sequence[int]) -> None:
        """Append committed tokens; the rows observed just before are those of this step."""
        if not len(tokens):
            return
        _, last = self._requests[request]
        before, emitted = [last, *map(int, tokens)][-2:]
        siblings = self._rows.get(before, ())
        guess = next((found for token, found in siblings if token != emitted), _NOTHING)
        self._requests[request] = guess, emitted

    def stop(self, request: str) -> None:
        """Forget a request; unknown ones are ignored."""
        self._requests.pop(request, None)

    def observe(self, rows: VerifiedRows) -> None:
        """Keep the rows until the next step's; siblings come best first."""
        self._rows = {}
        listed = zip(
            rows.contexts.tolist(), rows.top_ids.tolist(), rows.top_probs.tolist(), strict=True
        )
        for (before, last), ids, probs in listed:
            found = {t: p for t, p in zip(ids, probs, strict=True) if p > _LEAST}
            self._rows.setdefault(before, []).append((last, found))

    def root(self, request: str) -> _Context:
        """The committed context."""
        return self._requests[request]

    def advance(self, state: _Context, token: int) -> _Context:
        """Behind a drafted token nothing is guessed."""
        return _NOTHING, token

    def candidates(self, state: _Context) -> tuple[int, Candidates]:
        """Bucket 1 where there is a guess, else 0; and the guess."""
        found = state[0]
        return (1 if found else 0), found

    def prior(self, bucket: int, greedy: bool) -> float:
        """See `Source.prior`."""
        return 0.15 if bucket else 0.0
