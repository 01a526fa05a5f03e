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
from proposers.law import DraftLaw, Law


def swor(p: Law, q: DraftLaw, drawn: Sequence[int], chance: Chance) -> int:
    """One token with law `p`, most often among `drawn`.

    Args:
        p: the target's law.
        q: the law that the tokens were drawn from.
        drawn: distinct tokens in the order in which they were drawn.
        chance: decisions independent of the draws.

    Raises:
        ValueError: if a token cannot have been drawn at its turn.
    """
    # Only tokens of q change. `target` is p_k there, times `mass`: outside it stays p.
    target, draft = p[q.tokens], q.probs.copy()
    outside = max(0.0, 1.0 - float(target.sum()))
    for token in drawn:
        place = q.place(token)
        likely = float(draft[place])
        if not likely > 0.0:
            raise ValueError(
                f"swor: token {token} appears twice in {list(drawn)}; give tokens drawn without "
                "replacement"
            )
        mass = outside + float(target.sum())
        # Equal laws are rejected only by a rounding error, which may leave no mass at all.
        if mass > 0.0 and chance.accept(float(target[place]) / (mass * likely)):
            return token
        target = np.maximum(target - mass * draft, 0.0)
        draft[place] = 0.0
        rest = float(draft.sum())
        if rest > 0.0:
            draft /= rest
    weights = p.copy()
    weights[q.tokens] = target
    return chance.draw(weights if weights.any() else p)
