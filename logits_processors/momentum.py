# SPDX-License-Identifier: Apache-2.0
"""Momentum decoding: greedy search that resists running in circles (arXiv 2212.02175).

The text is a walk on a graph of tokens. Among the ``top_k`` most probable tokens the one with the
largest ``p(v) - alpha f(m(v))`` is taken. The circular depth ``m(v)`` is the length of the longest
n-gram ending in ``v`` that the text has had before, and ``f`` is the resistance: 0, 1, 3, 4, 5, 6
for depths 0 to 5, infinite beyond.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from .law import SamplingLaw
from .race import ascending

_RESISTANCE = np.array([0.0, 1.0, 3.0, 4.0, 5.0, 6.0, np.inf])


@dataclass(frozen=True)
class Momentum:
    """The rule's parameters.

    Args:
        alpha: strength of the resistance, from 0 (greedy search).
        top_k: number of candidates, at least 1.

    Raises:
        ValueError: an argument out of range.
    """

    alpha: float = 0.2
    top_k: int = 5

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha < np.inf:
            raise ValueError(f"alpha={self.alpha}: a finite number from 0 is allowed")
        if self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: at least 1 is allowed")

    def choose(self, logits: NDArray[np.floating], history: Sequence[int]) -> int:
        """Return the next token.

        Args:
            logits: ``[V]``.
            history: prompt and output tokens so far.
        """
        log_probs = SamplingLaw().log_probs(logits)
        # Tokens of probability 0 are no candidates: resistance can put all others below 0.
        candidates = np.array(list(islice(ascending(-log_probs), self.top_k)))
        depths = circular_depths(history, candidates)
        resistance = _RESISTANCE[depths]
        # alpha = 0 means no resistance, even where it would be infinite.
        penalty = self.alpha * resistance if self.alpha else np.zeros_like(resistance)
        return int(candidates[np.argmax(np.exp(log_probs[candidates]) - penalty)])


def circular_depths(history: Sequence[int], candidates: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return for each candidate the length of the longest repeated n-gram that it would end.

    Args:
        history: tokens so far.
        candidates: ``int[k]`` token ids.

    Returns:
        ``int64[k]``, 0 for a token that never occurred, counted up to 6.
    """
    tokens = np.asarray(history, dtype=np.int64)
    # context[j]: how many tokens before position j equal the last tokens of the history.
    context = np.zeros(tokens.size, dtype=np.int64)
    matching = np.ones(tokens.size, dtype=bool)
    for back in range(1, min(_RESISTANCE.size - 1, tokens.size)):
        shifted = np.zeros(tokens.size, dtype=bool)
        shifted[back:] = tokens[:-back] == tokens[-back]
        matching &= shifted
        context += matching
    depths = [context[tokens == candidate].max(initial=-1) + 1 for candidate in candidates]
    return np.array(depths, dtype=np.int64)
