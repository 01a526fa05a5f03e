# SPDX-License-Identifier: Apache-2.0
"""Drafts from a Hydra head (see `hydra`): what the mixture asks, answered in small products.

A drafted node costs one step of the head, whose time is that of reading its matrices: they are
kept in 8 bits (`rounded`). The mixture learns from acceptance what the head is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from proposers.hydra import HydraHead
from proposers.rounded import RoundedMatrix
from proposers.source import Candidates, VerifiedRows

WIDTH = 16
"""Candidates of a state."""

_NEGLIGIBLE = 0.01
_SURE = 0.5
_GREEDY_POWER = 1.5
"""A greedy request takes the target's best token, which the head's best is more often than q says:
q is sharpened to softmax(power * logits).
"""

_EPSILON = np.float32(np.finfo(np.float32).eps)
_HALF = np.float32(0.5)
_NOTHING: tuple[int, Candidates] = (0, {})

Floats: TypeAlias = NDArray[np.float32]


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
        self._inputs = head.inputs
        self._inner = RoundedMatrix(_floats(head.inner) * _floats(head.scale))
        self._outer = RoundedMatrix(_floats(head.outer))
        self._outputs = RoundedMatrix(_floats(head.outputs))
        self._gain = _floats(head.gain)
        self._bias = _floats(head.bias)
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
        for request, state in zip(requests, _floats(states), strict=True):
            greedy, last = self._requests[request]
            # Placeholders of multimodal inputs are no tokens.
            above = state if 0 <= last < len(self._inputs) else None
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
        """See `Source.prior`."""
        return (0.0, 0.5, 1.5)[bucket]

    def _fill(self, contexts: Sequence[_Context]) -> None:
        above = np.stack([c.above for c in contexts if c.above is not None])
        states = self._step(above, torch.tensor([c.token for c in contexts]))
        logits = self._outputs.times(states) + self._bias
        logits *= np.array([_GREEDY_POWER if c.greedy else 1.0 for c in contexts], np.float32)[
            :, None
        ]
        norms = torch.from_numpy(logits).logsumexp(-1, keepdim=True)
        best = torch.from_numpy(logits[:, :-1]).topk(min(WIDTH, len(self._tokens)))
        probs = (best.values - norms).exp().tolist()
        for context, state, values, places in zip(
            contexts, states, probs, best.indices.tolist(), strict=True
        ):
            pairs = zip(places, values, strict=True)
            found = {self._tokens[place]: q for place, q in pairs if q > _NEGLIGIBLE}
            context.state = state
            context.answer = (2 if values[0] >= _SURE else 1, found) if found else _NOTHING

    def _step(self, states: Floats, tokens: Tensor) -> Floats:
        """`HydraHead.step`, in NumPy."""
        normed = _normed(states)
        mixed = self._inner.times(normed) + _floats(self._inputs[tokens])
        mixed /= 1 + np.exp(-mixed)  # silu
        return _normed(normed * _HALF + self._outer.times(mixed)) * self._gain


def _normed(rows: Floats) -> Floats:
    square = np.einsum("nd,nd->n", rows, rows) / rows.shape[1]
    normed: Floats = rows / np.sqrt(square + _EPSILON)[:, None]
    return normed


def _floats(tensor: Tensor) -> Floats:
    array: Floats = tensor.float().numpy()
    return array
