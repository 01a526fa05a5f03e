# SPDX-License-Identifier: Apache-2.0
"""Recursive rejection sampling for children drawn without replacement.

RSD (arXiv 2402.14160), the rule of Sequoia and DySpec too. With p the target's law, q the draft's
and x_1, x_2, ... drawn from q without replacement, starting from p_1 = p and q_1 = q,

    accept x_k with probability min(1, p_k(x_k) / q_k(x_k)), else
    p_{k+1} = norm((p_k - q_k)+),    q_{k+1} = norm(q_k without x_k),

and if all were rejected the token is drawn from the last p. Exact for the draws in their order; if
every token that p allows was drawn, one of them is accepted. With one child this is the ratio rule
of speculative sampling (arXiv 2211.17192).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from proposers.chance import Chance
from proposers.sampled_tree import Law


def swor(p: Law, q: Law, drawn: Sequence[int], chance: Chance) -> int:
    """One token with law `p`, most often among `drawn`.

    Args:
        p: the target's law.
        q: the law that the tokens were drawn from.
        drawn: distinct tokens in the order in which they were drawn.
        chance: decisions independent of the draws.

    Raises:
        ValueError: if a token cannot have been drawn, because q without the earlier ones gives it
            no probability.
    """
    target, draft = p, q.copy()
    for token in drawn:
        likely = float(draft[token])
        if not likely > 0.0:
            raise ValueError(
                f"swor: token {token} has draft probability 0 at its turn in {list(drawn)}; give "
                "tokens drawn without replacement from q"
            )
        if chance.accept(float(target[token]) / likely):
            return token
        target = residual(target, draft)
        draft[token] = 0.0
        mass = float(draft.sum())
        if mass > 0.0:
            draft /= mass
    return chance.draw(target)


def residual(target: Law, draft: Law) -> Law:
    """norm((target - draft)+): the law of the target's draw given that the draft was rejected."""
    excess = np.maximum(target - draft, 0.0)
    mass = float(excess.sum())
    # Equal laws reject with the probability of a rounding error; then any law will do.
    return excess / mass if mass > 0.0 else target
