# SPDX-License-Identifier: Apache-2.0
"""What ASAp and CARS share: following a request down a prefix trie.

What a step saw is kept aside and reaches the trie when the driver confirms a token, because a row
whose draw is thrown away may belong to an unfinished prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from .bitmask import unpack
from .constraint import Constraint
from .law import SamplingLaw
from .prefix_trie import Node, PrefixTrie, bound_children
from .race import arrival_times, log_exponentials
from .sampler import Sampler, State


@dataclass(frozen=True)
class Seen:
    """What a step saw.

    Attributes:
        log_allowed: ``float64[V]``, ``log p`` of the allowed tokens, ``-inf`` for the others.
        scores: ``float64[V]``, ``log(p c)`` of each token by the bounds of that moment.
        log_live: log of the sum of ``p c``.
    """

    log_allowed: NDArray[np.float64]
    scores: NDArray[np.float64]
    log_live: float

    def log_bound(self, token: int) -> float:
        """Return ``log c`` of the prefix that an allowed ``token`` leads to."""
        if self.scores[token] == -np.inf:
            return -np.inf
        return float(self.scores[token] - self.log_allowed[token])


@dataclass
class TrieState(State):
    """A request in a trie.

    Attributes:
        path: the node of each prefix of the text, the empty one first; ``None`` where not stored.
        promises: for each prefix, ``log c`` at the time its last token was drawn; ``inf`` where it
            was not drawn here, so that CARS, whose law rests on it, begins anew.
        seen: what the last step saw; ``None`` once the trie knows it.
    """

    path: list[Node | None] = field(default_factory=list)
    promises: list[float] = field(default_factory=list)
    seen: Seen | None = None


class TrieSampler(Sampler[TrieState]):
    """Base of the samplers that learn a :class:`PrefixTrie`.

    Args:
        law: the user's law, with a temperature above 0: greedy texts are not a distribution.
        trie: shared by all requests of the same prompt, constraint and law.

    Raises:
        ValueError: a greedy law.
    """

    def __init__(self, law: SamplingLaw, trie: PrefixTrie) -> None:
        if law.greedy:
            raise ValueError("temperature 0 needs no trie; Masking and Awrs take the argmax")
        self._law = law
        self._trie = trie

    @override
    def start(self, constraint: Constraint, seed: int) -> TrieState:
        if constraint.num_accepted:
            raise ValueError(
                f"the constraint already holds {constraint.num_accepted} tokens; a trie begins at "
                "the empty text, so start there and call advance for each token"
            )
        return TrieState(constraint, seed, path=[self._trie.root], promises=[0.0])

    @override
    def advance(self, state: TrieState, token: int) -> bool:
        if not state.constraint.accept(token):
            return False
        node, seen = state.path[-1], state.seen
        child = None
        if node is not None and seen is not None:
            child = self._trie.observe(node, seen.log_allowed, token)
        elif node is not None:
            child = node.children.get(token)
        state.path.append(child)
        state.promises.append(math.inf if seen is None else seen.log_bound(token))
        state.seen = None
        return True

    @override
    def rewind(self, state: TrieState, count: int) -> None:
        state.constraint.rollback(count)
        del state.path[len(state.path) - count :]
        del state.promises[len(state.promises) - count :]
        state.seen = None

    def fail(self, state: TrieState) -> None:
        """Record that the text of ``state`` was cut off before it was complete.

        Texts that do not fit the length limit are no members of the language that is sampled.
        """
        node = state.path[-1]
        if node is not None:
            self._trie.refute(node)

    def _look(self, state: TrieState, logits: NDArray[np.floating]) -> Seen:
        """Return the bounded law of the next token, and keep it for the trie."""
        allowed = unpack(state.constraint.full_mask(), logits.size)
        log_allowed = np.where(allowed, self._law.log_probs(logits), -np.inf)
        state.seen = Seen(log_allowed, *bound_children(state.path[-1], log_allowed))
        return state.seen

    @staticmethod
    def _race(state: TrieState, scores: NDArray[np.float64]) -> int:
        noise = log_exponentials(state.seed, state.position, scores.size, attempt=state.attempt)
        return int(np.argmin(arrival_times(scores, noise)))
