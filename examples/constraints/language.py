# SPDX-License-Identifier: Apache-2.0
"""A finite constrained language under a model, enumerated: the truth to judge samplers by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logits_processors.bitmask import unpack
from logits_processors.constraint import CompiledConstraint
from logits_processors.law import SamplingLaw, logsumexp

Prefix = tuple[int, ...]
Rows = Callable[[Sequence[Prefix]], NDArray[np.floating]]
"""Next-token logits ``[len(prefixes), V]`` after each of some prefixes of equal length."""


@dataclass(frozen=True)
class Language:
    """Every token string that a constraint allows, with its exact probabilities.

    Attributes:
        rows: logits ``[V]`` after each prefix that can be reached.
        texts: the members, end-of-text token included; one per spelling in tokens.
        mass: probability that the unconstrained model draws a member.
        truth: ``float64[K]``, ``p(text | constraint)``.
        masked: ``float64[K]``, the law of masking token by token.
    """

    rows: dict[Prefix, NDArray[np.floating]]
    texts: tuple[Prefix, ...]
    mass: float
    truth: NDArray[np.float64]
    masked: NDArray[np.float64]


def enumerate_language(
    compiled: CompiledConstraint, rows: Rows, law: SamplingLaw, max_prefixes: int = 10_000
) -> Language:
    """Walk every allowed continuation, level by level, asking the model once per prefix.

    Raises:
        ValueError: more than ``max_prefixes`` prefixes, or no member at all.
    """
    table: dict[Prefix, NDArray[np.floating]] = {}
    members: dict[Prefix, tuple[float, float]] = {}  # log p(text), log q(text) of masking
    level: dict[Prefix, tuple[float, float]] = {(): (0.0, 0.0)}
    while level:
        if len(table) + len(level) > max_prefixes:
            raise ValueError(
                f"the constraint allows more than {max_prefixes} prefixes; the toy enumerates its "
                "language, which must be finite and small"
            )
        table.update(zip(level, rows(list(level)), strict=True))
        following: dict[Prefix, tuple[float, float]] = {}
        for prefix, (log_p, log_q) in level.items():
            constraint = compiled.start()
            assert all(map(constraint.accept, prefix))
            log_row = law.log_probs(table[prefix])
            allowed = np.flatnonzero(unpack(constraint.full_mask(), log_row.size))
            log_mass = logsumexp(log_row[allowed])
            for token in map(int, allowed):
                ended = token in compiled.vocabulary.eos_ids
                (members if ended else following)[(*prefix, token)] = (
                    log_p + float(log_row[token]),
                    log_q + float(log_row[token]) - log_mass,
                )
        level = following
    if not members:
        raise ValueError("the constraint has no member that this vocabulary can spell")
    log_p, log_q = np.array(list(members.values())).T
    log_total = logsumexp(log_p)
    return Language(
        table, tuple(members), float(np.exp(log_total)), np.exp(log_p - log_total), np.exp(log_q)
    )
