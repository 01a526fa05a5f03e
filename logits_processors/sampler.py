# SPDX-License-Identifier: Apache-2.0
"""What all constrained samplers share: a request's state, the result of a step, the driver's calls.

A step only proposes. The state moves when the driver says which token was really emitted, because
engines also compute rows whose draw is thrown away (chunked prefill, rejected drafts).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from .bitmask import unpack
from .constraint import Constraint
from .race import ascending


@dataclass(frozen=True)
class Draw:
    """The outcome of one step.

    Attributes:
        token: the drawn id; ``None`` when nothing can follow here (``restart`` false) or when the
            whole attempt has to be drawn again (``restart`` true).
        log_weight: natural logarithm of the step's importance weight; ``-inf`` without a token.
        checks: token checks asked of the constraint.
        used_mask: whether a full mask was asked of it.
        restart: the driver must call ``restart`` and begin the text anew.
    """

    token: int | None
    log_weight: float
    checks: int = 0
    used_mask: bool = False
    restart: bool = False


@dataclass
class State:
    """A request: its constraint and its noise.

    Attributes:
        constraint: state of the constraint at the emitted tokens.
        seed: with the position, the key of all noise.
        attempt: how often the text was begun anew.
    """

    constraint: Constraint
    seed: int
    attempt: int = 0

    @property
    def position(self) -> int:
        """Index of the token that the next step draws."""
        return self.constraint.num_accepted


S = TypeVar("S", bound=State)


class Sampler(ABC, Generic[S]):
    """A rule for drawing constrained tokens; holds no per-request state."""

    @abstractmethod
    def start(self, constraint: Constraint, seed: int) -> S:
        """Return the state of a new request; ``constraint`` may already hold a prefix."""

    @abstractmethod
    def step(self, state: S, logits: NDArray[np.floating]) -> Draw:
        """Draw the next token for the raw ``logits`` ``[V]``, leaving the text of ``state`` alone.

        Raises:
            ConstraintRuntimeError: the constraint could not be evaluated.
        """

    def advance(self, state: S, token: int) -> bool:
        """Record that ``token`` was emitted; ``False`` if the constraint forbids it."""
        return state.constraint.accept(token)

    def rewind(self, state: S, count: int) -> None:
        """Take back the last ``count`` emitted tokens."""
        state.constraint.rollback(count)


class Checker:
    """Token checks of one step: cached, counted, and replaced by the full mask after too many.

    Args:
        constraint: what to ask.
        vocab_size: number of logits.
        max_rejects: refusals after which the budget is spent and the mask should be used.
    """

    def __init__(self, constraint: Constraint, vocab_size: int, max_rejects: int) -> None:
        self._constraint = constraint
        self._vocab_size = vocab_size
        self._rejects_left = max_rejects
        self._known: dict[int, bool] = {}
        self._mask: NDArray[np.bool_] | None = None

    @property
    def checks(self) -> int:
        """Number of questions asked so far, mask excluded."""
        return len(self._known)

    @property
    def spent(self) -> bool:
        """Whether the budget of refusals is spent."""
        return self._rejects_left <= 0

    @property
    def used_mask(self) -> bool:
        """Whether the mask was fetched."""
        return self._mask is not None

    def mask(self) -> NDArray[np.bool_]:
        """Return the full mask ``bool[vocab_size]``, fetched on the first call."""
        if self._mask is None:
            self._mask = unpack(self._constraint.full_mask(), self._vocab_size)
        return self._mask

    def allows(self, token: int) -> bool:
        """Tell whether the constraint allows ``token``."""
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._constraint.allows(token)
            self._rejects_left -= not known
        return known


def dead_end(checker: Checker) -> Draw:
    """Return the draw of a step after which nothing is possible."""
    return Draw(None, -math.inf, checker.checks, checker.used_mask)


def constrained_argmax(
    constraint: Constraint, logits: NDArray[np.floating], max_rejects: int
) -> Draw:
    """Return the most probable allowed token, ordered by ``(-logit, id)``; its weight is 1.

    Args:
        constraint: the request's constraint.
        logits: ``[V]``; ``-inf`` is never chosen.
        max_rejects: refusals after which the full mask is fetched.
    """
    checker = Checker(constraint, logits.size, max_rejects)
    keys = -logits.astype(np.float64)
    for token in ascending(keys):
        if checker.spent:
            allowed = np.where(checker.mask(), keys, np.inf)
            best = int(np.argmin(allowed))
            if allowed[best] == np.inf:
                break
            return Draw(best, 0.0, checker.checks, True)
        if checker.allows(token):
            return Draw(token, 0.0, checker.checks, False)
    return dead_end(checker)
