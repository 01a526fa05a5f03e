# SPDX-License-Identifier: Apache-2.0
"""Adaptive weighted rejection sampling (arXiv 2504.05410): few checks, proper weights.

A step returns a token ``x`` and a weight ``w`` with ``E[w 1{x = a}] = p(a) 1{a in A}`` for every
token ``a``, where ``A`` is the set that the constraint allows. Tokens arrive without replacement
from ``p`` until one is accepted; the rejected ones carry the information on ``p(A)``:

- ``recursive``: for every ``x`` and every set ``R`` of remaining tokens,
  ``Z(R) = q(x) 1{x in A} + (1 - q(x)) Z(R - x)`` with ``q = p / p(R)``. Follow it through the
  rejected tokens (the factors multiply to the remaining mass) and through ``x``; put the indicator
  of the next arrival for the last ``Z``.
- ``two_loop``: a second race over what the first did not reject counts further rejects;
  ``w = p(R) / (rejects + 1)``.
- ``geometric``: the draws with replacement that the race skipped are filled in by geometric counts;
  ``w = (a - 1) / (draws - 1)`` for ``a`` accepts, the unbiased estimator of inverse sampling.

Without its weights AWRS is plain masking made cheaper, with the bias of masking.

After ``max_rejects`` refusals the full mask is fetched once. For ``recursive`` the rest is then
exact: given the rejected tokens, ``x`` follows ``p`` restricted to ``A`` and ``w = p(A)``. The
other two go on with the mask in place of checks, which leaves their law alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from .constraint import Constraint
from .law import SamplingLaw, logsumexp
from .race import arrival_times, ascending, log_exponentials, uniforms
from .sampler import Checker, Draw, Sampler, State, constrained_argmax, dead_end

Estimator: TypeAlias = Literal["recursive", "two_loop", "geometric"]

_Floats: TypeAlias = NDArray[np.float64]


class Awrs(Sampler[State]):
    """Adaptive weighted rejection sampling.

    Args:
        law: the user's law. Where top-k or top-p leave no allowed token the text has weight 0 under
            that law, and the step says so instead of widening it.
        estimator: which of the published weights.
        max_rejects: refusals in a step after which the full mask is fetched.
        max_accepts: accepts that ``geometric`` waits for; more cost checks and lower the variance.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        law: SamplingLaw,
        estimator: Estimator = "recursive",
        max_rejects: int = 64,
        max_accepts: int = 2,
    ) -> None:
        if estimator not in get_args(Estimator):
            raise ValueError(f"estimator={estimator!r}: allowed are {get_args(Estimator)}")
        if max_rejects < 1:
            raise ValueError(f"max_rejects={max_rejects}: at least 1 is allowed")
        if max_accepts < 2:
            raise ValueError(f"max_accepts={max_accepts}: at least 2 is allowed")
        self._law = law
        self._estimator = estimator
        self._max_rejects = max_rejects
        self._max_accepts = max_accepts

    @override
    def start(self, constraint: Constraint, seed: int) -> State:
        return State(constraint, seed)

    @override
    def step(self, state: State, logits: NDArray[np.floating]) -> Draw:
        if self._law.greedy:
            return constrained_argmax(state.constraint, logits, self._max_rejects)
        log_probs = self._law.log_probs(logits)
        checker = Checker(state.constraint, logits.size, self._max_rejects)

        key = (state.seed, state.position)

        def race(stream: int) -> _Floats:
            noise = log_exponentials(*key, logits.size, attempt=state.attempt, stream=stream)
            return arrival_times(log_probs, noise)

        def gaps(stream: int, count: int) -> _Floats:
            return uniforms(*key, count, attempt=state.attempt, stream=stream)

        times = race(0)
        token, rejected = _race(times, checker)
        if token is None:
            return dead_end(checker)
        if self._estimator == "recursive":
            log_weight = _recursive(log_probs, times, token, rejected, checker)
        elif self._estimator == "two_loop":
            again = race(1)
            again[rejected] = np.inf
            rejects = len(rejected) + len(_race(again, checker)[1])
            log_weight = _log_rest(log_probs, rejected) - math.log(rejects + 1)
        else:
            draws = _Replacement(log_probs)
            draws.add(rejected, token, gaps(1, len(rejected) + 1))
            for loop in range(1, self._max_accepts):
                again = race(2 * loop)
                again[draws.rejected] = np.inf
                accepted, rejected = _race(again, checker)
                assert accepted is not None  # the first token is still in the race
                draws.add(rejected, accepted, gaps(2 * loop + 1, len(rejected) + 1))
            log_weight = math.log(self._max_accepts - 1) - math.log(draws.count - 1)
        return Draw(token, min(0.0, log_weight), checker.checks, checker.used_mask)


def _race(times: _Floats, checker: Checker) -> tuple[int | None, list[int]]:
    """Return the first accepted arrival and the rejected ones before it, in order."""
    rejected: list[int] = []
    for token in ascending(times):
        if checker.spent:
            break
        if checker.allows(token):
            return token, rejected
        rejected.append(token)
    else:
        return None, rejected
    accepted_times = np.where(checker.mask(), times, np.inf)
    token = int(np.argmin(accepted_times))
    if accepted_times[token] == np.inf:
        return None, rejected
    earlier = np.flatnonzero(times < times[token])
    return token, [int(i) for i in earlier[np.argsort(times[earlier], kind="stable")]]


def _log_rest(log_probs: _Floats, rejected: Sequence[int]) -> float:
    """Return the log mass outside ``rejected``, without cancellation when little is left."""
    if not rejected:
        return 0.0
    gone = float(np.exp(log_probs[list(rejected)]).sum())
    if gone < 0.5:
        return math.log1p(-gone)
    rest = log_probs.copy()
    rest[list(rejected)] = -np.inf
    return logsumexp(rest)


def _recursive(
    log_probs: _Floats, times: _Floats, token: int, rejected: Sequence[int], checker: Checker
) -> float:
    if checker.used_mask:
        return logsumexp(np.where(checker.mask(), log_probs, -np.inf))
    log_rest = _log_rest(log_probs, rejected)
    following = np.where(times > times[token], times, np.inf)
    successor = int(np.argmin(following))
    if following[successor] == np.inf or checker.allows(successor):
        return log_rest
    return float(log_probs[token])


class _Replacement:
    """Counts the draws with replacement that a race without replacement stands for."""

    def __init__(self, log_probs: _Floats) -> None:
        self._log_probs = log_probs
        self.rejected: list[int] = []
        self.count = 0.0

    def add(self, rejected: Sequence[int], accepted: int, noise: _Floats) -> None:
        """Add a race: its rejects in order, its accept, and a uniform for each of them."""
        before = np.exp(self._log_probs[self.rejected]).sum()
        steps = np.exp(self._log_probs[list(rejected)])
        gone = before + np.concatenate(([0.0], np.cumsum(steps)))
        self.rejected.extend(rejected)
        self.count += len(rejected) + 1
        # Draws that hit what is already out come before each arrival, geometric in number.
        some = gone > 0.0
        log_gone = np.log(np.minimum(gone[some], 1.0 - 2.0**-53))
        self.count += float(np.floor(np.log(noise[some]) / log_gone).sum())
