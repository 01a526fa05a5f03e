# SPDX-License-Identifier: Apache-2.0
"""SpecTr's k-SEQ (arXiv 2310.15141, algorithm 2) for k children drawn independently from q.

With b(g) = sum_x min(q(x), p(x) / g) and 1 <= g <= k, the draws are tried in turn,

    accept x with probability min(1, p(x) / (g q(x))),

one of k is accepted with probability a = 1 - (1 - b)^k, and otherwise the token is drawn from

    norm(p - min(q, p / g) a / b),

which is a law iff a <= g b. The left side falls and the right side rises with g, so bisection finds
the smallest such g, which accepts most; any larger one is exact too, so the error of the bisection
costs acceptance and nothing else. k = 1 has g = 1, the ratio rule (arXiv 2211.17192).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from proposers.chance import Chance
from proposers.law import DraftLaw, Law

_BISECTIONS = 30


def kseq(p: Law, q: DraftLaw, drawn: Sequence[int], chance: Chance) -> int:
    """One token with law `p`, most often among `drawn`.

    Args:
        p: the target's law.
        q: the law that the tokens were drawn from.
        drawn: tokens drawn independently, repeated ones included.
        chance: decisions independent of the draws.

    Raises:
        ValueError: if q gives a drawn token no probability.
    """
    k = len(drawn)
    if k == 0:
        return chance.draw(p)
    possible = p[q.tokens]
    g = gamma(possible, q.probs, k)
    for token in drawn:
        place = q.place(token)
        if chance.accept(float(possible[place]) / (g * float(q.probs[place]))):
            return token
    common = np.minimum(q.probs, possible / g)
    overlap = float(common.sum())
    if overlap <= 0.0:
        return chance.draw(p)
    weights = p.copy()
    share = any_accepted(overlap, k) / overlap
    weights[q.tokens] = np.maximum(possible - common * share, 0.0)
    # Without a rest every draw is accepted, but for the rounding of a probability just below 1.
    return chance.draw(weights if weights.any() else p)


def gamma(p: Law, q: Law, k: int) -> float:
    """The smallest valid g in [1, k] for k draws, to a billionth of k, rounded up.

    Args:
        p: the target's probabilities of the tokens that q can draw.
        q: the draft's.
        k: number of draws.
    """
    # From one ratio p/q to the next, b(g) = below / g + above: only the tokens whose ratio g
    # passes change their side, and those outside (1, k) never do.
    changing = (p > q) & (p < k * q)
    some_p, some_q = p[changing], q[changing]
    ratios = some_p / some_q
    order = np.argsort(ratios)
    ratios = ratios[order]
    below = np.cumsum(np.append(p[p <= q].sum(), some_p[order]))
    above = np.cumsum(np.append(q[(p > q) & (p >= k * q)].sum(), some_q[order[::-1]]))[::-1]

    def valid(g: float, segment: int) -> bool:
        overlap = float(below[segment]) / g + float(above[segment])
        return any_accepted(overlap, k) <= g * overlap

    segments = range(len(ratios))
    segment = bisect_left(segments, True, key=lambda i: valid(float(ratios[i]), i))
    low, high = 1.0, float(ratios[segment]) if segment < len(ratios) else float(k)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if valid(middle, segment):
            high = middle
        else:
            low = middle
    return high


def any_accepted(overlap: float, k: int) -> float:
    """1 - (1 - overlap)^k, the probability that one of k draws is accepted."""
    if overlap >= 1.0:
        return 1.0
    return -math.expm1(k * math.log1p(-overlap))
