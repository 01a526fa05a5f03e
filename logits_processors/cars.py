# SPDX-License-Identifier: Apache-2.0
"""CARS: constrained adaptive rejection sampling (arXiv 2510.01902), exact at every accepted draw.

A text is drawn token by token from ``p(x | w) c(wx) / c(w)`` with the bounds ``c`` of a prefix
trie, and the attempt goes on from ``w`` with probability ``c_now(w) / c_drawn(w)``: the bound of
today over the bound with which the last token was drawn. Over a text these factors telescope to
``p(text)`` divided by the root's bound at the start, so that a completed text follows
``p(text | constraint)``.

For a prefix never seen before the ratio is the mass of its allowed tokens: the paper's draw from
the unmasked law that is given up at a forbidden token. Writing it with the ratio also covers bounds
that *other* requests lower while this one runs, which the paper's sequential statement leaves out.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from .race import uniforms
from .sampler import Draw
from .trie_sampler import TrieSampler, TrieState

_COIN_STREAM = 1


class Cars(TrieSampler):
    """Exact sampling by restarts; each failed attempt raises the chance of the next.

    A :class:`Draw` with ``restart`` asks the driver to call :meth:`restart` and to generate the
    text anew from the prompt.
    """

    @override
    def step(self, state: TrieState, logits: NDArray[np.floating]) -> Draw:
        seen = self._look(state, logits)
        if state.position == 0:
            if seen.log_live == -math.inf:
                return Draw(None, -math.inf, used_mask=True)
        else:
            coin = uniforms(
                state.seed, state.position, 1, attempt=state.attempt, stream=_COIN_STREAM
            )[0]
            if math.log(coin) >= seen.log_live - state.promises[-1]:
                return Draw(None, -math.inf, used_mask=True, restart=True)
        return Draw(self._race(state, seen.scores), 0.0, used_mask=True)

    def restart(self, state: TrieState) -> None:
        """Begin the text of ``state`` anew, with fresh noise, after learning from the last step."""
        node = state.path[-1]
        if node is not None and state.seen is not None:
            self._trie.observe(node, state.seen.log_allowed, None)
        self.rewind(state, state.position)
        state.attempt += 1
