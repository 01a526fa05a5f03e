# SPDX-License-Identifier: Apache-2.0
"""Drafts from a Hydra head (see `hydra`) as a source of the mixture.

A node costs one step of the head (`hydra_kernel`). The mixture learns from acceptance what the head
is worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from proposers.hydra import HydraHead
from proposers.hydra_kernel import Floats, HydraKernel, floats
from proposers.source import Candidates, VerifiedRows

WIDTH = 16
"""Candidates of a state."""

_NEGLIGIBLE = 0.01
_SURE = 0.5
_GREEDY_POWER = 1.5
"""A greedy request takes the target's best token, which the head's best is more often than q says:
q is sharpened to softmax(power * logits).
"""

_NOTHING: tuple[int, Candidates] = (0, {})


class _Context:
    """A state of the head, made from the one above when its candidates are asked for."""

    __slots__ = ("above", "answer", "greedy", "root", "state", "token")

    def __init__(self, above: Floats | None, token: int, *, greedy: bool, root: bool) -> None:
        self.above = above
        self.token = token
        self.greedy = greedy
        self.root = root
        self.state: Floats | None = None
        self.answer = _NOTHING

    @property
    def waits(self) -> bool:
        """Whether there is something to compute that was not computed yet."""
        return self.state is None and self.above is not None


class HydraSource:
    """Drafts from a `HydraHead`; silent for a request until `see` gives its newest state.

    Args:
        head: the network.
    """

    def __init__(self, head: HydraHead) -> None:
        self._tokens: list[int] = head.tokens.tolist()
        self._kernel = HydraKernel(head)
        self._requests: dict[str, tuple[bool, int]] = {}  # greedy, last token
        self._roots: dict[str, _Context] = {}

    def start(
        self, request: str, tokens: Sequence[int], *, greedy: bool, namespace: int = 0
    ) -> None:
        """Begin a request; see `Source.start`."""
        self._requests[request] = greedy, int(tokens[-1]) if len(tokens) else -1
        self._roots.pop(request, None)

    def extend(self, request: str, tokens: Sequence[int]) -> None:
        """Append committed tokens; the state seen before is no longer the newest."""
        if len(tokens):
            self._requests[request] = self._requests[request][0], int(tokens[-1])
            self._roots.pop(request, None)

    def stop(self, request: str) -> None:
        """Forget a request; unknown ones are ignored."""
        self._requests.pop(request, None)
        self._roots.pop(request, None)

    def observe(self, rows: VerifiedRows) -> None:
        """Nothing to learn: the head is trained offline."""

    def see(self, requests: Sequence[str], states: Tensor) -> None:
        """See `StateSource.see`."""
        for request, state in zip(requests, floats(states), strict=True):
            greedy, last = self._requests[request]
            # Placeholders of multimodal inputs are no tokens.
            above = state if 0 <= last < self._kernel.vocab_size else None
            self._roots[request] = _Context(above, last, greedy=greedy, root=True)

    def root(self, request: str) -> _Context:
        """The committed context."""
        return self._roots.get(request) or _Context(None, -1, greedy=False, root=False)

    def advance(self, state: _Context, token: int) -> _Context:
        """The state after one more token."""
        return _Context(state.state, token, greedy=state.greedy, root=False)

    def candidates(self, state: _Context) -> tuple[int, Candidates]:
        """Bucket 2 where the head is sure, 1 where it is not, 0 where it is silent."""
        if state.waits:
            # Roots of a batch in one pass: which of them will be asked for is decided together.
            others = self._roots.values() if state.root else ()
            self._fill([state, *(c for c in others if c.waits and c is not state)])
        return state.answer

    def prior(self, bucket: int, greedy: bool) -> float:
        """See `Source.prior`: it was trained to say how probable a token is."""
        return (0.0, 2.0, 4.0)[bucket]

    def _fill(self, contexts: Sequence[_Context]) -> None:
        above = np.stack([c.above for c in contexts if c.above is not None])
        powers = np.array([_GREEDY_POWER if c.greedy else 1.0 for c in contexts], np.float32)
        states, logits, norms = self._kernel.step(above, [c.token for c in contexts], powers)
        best = torch.from_numpy(logits[:, :-1]).topk(min(WIDTH, len(self._tokens)))
        rows = zip(best.values.tolist(), best.indices.tolist(), norms.tolist(), strict=True)
        for context, state, (values, places, norm) in zip(contexts, states, rows, strict=True):
            found = {}
            for place, value in zip(places, values, strict=True):
                q = math.exp(value - norm)
                if q <= _NEGLIGIBLE:
                    break
                found[self._tokens[place]] = q
            context.state = state
            if found:
                context.answer = (2 if max(found.values()) >= _SURE else 1), found
