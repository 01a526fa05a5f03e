# SPDX-License-Identifier: Apache-2.0
"""Mirostat: truncation that holds the surprise of the text at a target (arXiv 2007.14966).

The surprise of a token is ``-log2 p``. A controller keeps a cap ``mu``, starting at twice the
target ``tau``, and after each token moves it by ``-eta (surprise - tau)``. Version 1 estimates the
exponent ``s`` of Zipf's law from the most probable tokens and keeps ``k`` tokens,
``k = (epsilon 2^mu / (1 - n^-epsilon))^(1/s)`` with ``epsilon = s - 1`` and ``n`` the
size of the vocabulary; version 2 drops the tokens whose own surprise exceeds ``mu``.

The cores only truncate: the engine draws, and reports the token back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .law import SamplingLaw
from .race import ascending

_ZIPF_TOKENS = 100


@dataclass(frozen=True)
class Mirostat:
    """The controller's parameters.

    Args:
        version: 1 or 2.
        tau: target surprise in bits, above 0.
        eta: learning rate, above 0.
        temperature: what the engine divides logits by; surprise is measured after it.

    Raises:
        ValueError: an argument out of range.
    """

    version: Literal[1, 2] = 2
    tau: float = 5.0
    eta: float = 0.1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.version not in (1, 2):
            raise ValueError(f"version={self.version}: 1 and 2 are allowed")
        for name in ("tau", "eta", "temperature"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name}={getattr(self, name)}: a finite number above 0 is allowed"
                )

    @property
    def initial_mu(self) -> float:
        """The cap before the first token."""
        return 2.0 * self.tau

    def surprise(self, logits: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the surprise of each token in bits, ``float64[V]``."""
        return -SamplingLaw(self.temperature).log_probs(logits) / math.log(2.0)

    def keep(self, surprise: NDArray[np.float64], mu: float) -> NDArray[np.bool_]:
        """Return ``bool[V]``: which tokens may be drawn under the cap ``mu``, at least one."""
        if self.version == 2:
            kept: NDArray[np.bool_] = surprise <= mu
            kept[np.argmin(surprise)] = True
            return kept
        top = surprise[list(islice(ascending(surprise), _ZIPF_TOKENS))]
        last = int(min(_zipf_rank(top, surprise.size, mu), surprise.size - 1))
        # Partition, not sort: of a large vocabulary, sorting would cost 5 ms per token.
        bound = np.partition(surprise, last)[last]
        kept = surprise < bound
        kept[np.flatnonzero(surprise == bound)[: last + 1 - np.count_nonzero(kept)]] = True
        return kept

    def update(self, mu: float, surprise: float) -> float:
        """Return the cap after a token of the given surprise in bits."""
        return mu - self.eta * (surprise - self.tau)


def _zipf_rank(top: NDArray[np.float64], size: int, mu: float) -> float:
    """Return ``k`` of version 1, at most ``size``, for the lowest surprises in ascending order."""
    if top.size < 2:
        return 0.0
    ranks = np.arange(1, top.size)
    t = np.log((ranks + 1) / ranks)
    b = np.diff(top) * math.log(2.0)
    s = float((t * b).sum() / (t * t).sum())
    if s <= 0.0:
        return float(size)
    epsilon = s - 1.0
    log_n = math.log(size)
    # (1 - n^-epsilon) / epsilon, whose limit at epsilon = 0 is log n.
    harmonic = -math.expm1(-epsilon * log_n) / epsilon if abs(epsilon) > 1e-12 else log_n
    log_k = (mu * math.log(2.0) - math.log(harmonic)) / s
    return math.exp(min(log_k, log_n))
