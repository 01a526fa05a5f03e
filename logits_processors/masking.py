# SPDX-License-Identifier: Apache-2.0
"""Plain masking: the control, and the rule of every structured-output engine.

Draws from ``p`` restricted to the allowed set ``A`` and renormalised. Text by text that is not
``p(text | constraint)``: each step divides by its own mass ``p(A)``. The weight of a step is
exactly that mass, so *weighted* samples are proper, and no step weight varies less.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from .bitmask import unpack
from .constraint import Constraint
from .law import SamplingLaw, logsumexp
from .race import arrival_times, log_exponentials
from .sampler import Draw, Sampler, State, constrained_argmax


class Masking(Sampler[State]):
    """Locally constrained sampling.

    Args:
        law: the user's law; top-k and top-p apply before the mask, as for all samplers here.
    """

    def __init__(self, law: SamplingLaw) -> None:
        self._law = law

    @override
    def start(self, constraint: Constraint, seed: int) -> State:
        return State(constraint, seed)

    @override
    def step(self, state: State, logits: NDArray[np.floating]) -> Draw:
        if self._law.greedy:
            return constrained_argmax(state.constraint, logits, max_rejects=0)
        allowed = unpack(state.constraint.full_mask(), logits.size)
        scores = np.where(allowed, self._law.log_probs(logits), -np.inf)
        log_mass = logsumexp(scores)
        if log_mass == -math.inf:
            return Draw(None, -math.inf, used_mask=True)
        noise = log_exponentials(state.seed, state.position, logits.size, attempt=state.attempt)
        token = int(np.argmin(arrival_times(scores, noise)))
        return Draw(token, min(0.0, log_mass), used_mask=True)
