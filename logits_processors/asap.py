# SPDX-License-Identifier: Apache-2.0
"""ASAp: adaptive sampling with approximate expected futures (arXiv 2405.21047).

The next token is drawn from ``p(x | w) c(wx) / c(w)``. With an empty trie that is plain masking; as
the bounds ``c`` sink to the expected future grammaticality the law of the texts converges to
``p(text | constraint)``. Unlike in the paper's code, every draw also has its importance weight,
``c(w) / c(wx)`` per step, which is proper from the first draw on.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from .sampler import Draw
from .trie_sampler import TrieSampler, TrieState


class Asap(TrieSampler):
    """Adaptive sampling that converges to the conditional law; exact in the limit."""

    @override
    def step(self, state: TrieState, logits: NDArray[np.floating]) -> Draw:
        seen = self._look(state, logits)
        if seen.log_live == -math.inf:
            return Draw(None, -math.inf, used_mask=True)
        token = self._race(state, seen.scores)
        return Draw(token, seen.log_live - seen.log_bound(token), used_mask=True)
