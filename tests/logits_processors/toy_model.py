# SPDX-License-Identifier: Apache-2.0
"""Models and constraints small enough to enumerate: the ground truth of the sampler tests."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from logits_processors.bitmask import Bitmask, pack
from logits_processors.constraint import CompiledConstraint, Constraint, check_rollback
from logits_processors.law import SamplingLaw
from logits_processors.sampler import Draw, Sampler
from logits_processors.vocabulary import Vocabulary

EOS = 3
TINY = Vocabulary((b"0", b"1", b"2", b""), eos_ids=(EOS,))
"""Characters only, so that a text has one spelling."""

BYTES = Vocabulary(
    (*(bytes([i]) for i in range(256)), b"ab", b"the ", b'{"', b'": ', "é".encode(), b"", b""),
    eos_ids=(261,),
)
"""All bytes, a few longer tokens, an end-of-text id and a control id."""

# The shape of the 17-string language of the GAD paper: "00000", or "1" and four more digits.
LANGUAGE = ("00000", *("1" + "".join(t) for t in itertools.product("01", repeat=4)))
GRAMMAR = 'root ::= "00000" | "1" [01] [01] [01] [01]'


class ToyModel:
    """A fixed random law per prefix.

    Args:
        seed: which model.
        scale: standard deviation of the logits.
        rare: added to the logit of "1" at the start, to make the constraint improbable.
    """

    def __init__(self, seed: int, scale: float = 1.0, rare: float = 0.0) -> None:
        self._seed, self._scale, self._rare = seed, scale, rare
        self._rows: dict[tuple[int, ...], NDArray[np.float64]] = {}

    def logits(self, prefix: Sequence[int]) -> NDArray[np.float64]:
        key = tuple(prefix)
        if key not in self._rows:
            digest = hashlib.blake2b(repr((self._seed, key)).encode(), digest_size=8).digest()
            row = np.random.default_rng(int.from_bytes(digest, "little")).normal(size=TINY.size)
            row *= self._scale
            # Lean towards the language, or its mass would drown in restarts.
            row[[0, 1] if len(key) < 5 else [EOS]] += 2.0
            if not key:
                row[1] += self._rare
            self._rows[key] = row
        return self._rows[key]

    def log_prob(self, tokens: Sequence[int], law: SamplingLaw) -> float:
        return sum(
            float(law.log_probs(self.logits(tokens[:i]))[token]) for i, token in enumerate(tokens)
        )


def spell(text: str) -> tuple[int, ...]:
    """Return the tokens of a text over TINY, the end of text included."""
    return (*(int(c) for c in text), EOS)


def exact(model: ToyModel, law: SamplingLaw) -> tuple[dict[tuple[int, ...], float], float]:
    """Return the conditional law over LANGUAGE, and the mass of LANGUAGE under the model."""
    joint = {spell(text): math.exp(model.log_prob(spell(text), law)) for text in LANGUAGE}
    mass = sum(joint.values())
    return {tokens: p / mass for tokens, p in joint.items()}, mass


def generate(
    sampler: Sampler[Any], model: ToyModel, compiled: CompiledConstraint, seed: int
) -> tuple[tuple[int, ...], float, list[Draw]]:
    """Drive a sampler to the end of a text; returns its tokens, log weight and draws."""
    state = sampler.start(compiled.start(), seed)
    tokens: list[int] = []
    draws: list[Draw] = []
    log_weight = 0.0
    while not tokens or tokens[-1] != EOS:
        draw = sampler.step(state, model.logits(tokens))
        draws.append(draw)
        if draw.restart:
            sampler.restart(state)  # type: ignore[attr-defined]
            tokens, log_weight = [], 0.0
            continue
        log_weight += draw.log_weight
        if draw.token is None:
            break
        assert sampler.advance(state, draw.token)
        tokens.append(draw.token)
    return tuple(tokens), log_weight, draws


class SetConstraint(Constraint):
    """Allows a fixed set of tokens at every position; has no cheap mask."""

    def __init__(self, allowed: Sequence[int], vocab_size: int) -> None:
        self._allowed = frozenset(allowed)
        self._vocab_size = vocab_size
        self._accepted = 0
        self.asked: list[int] = []
        self.masks = 0

    @property
    @override
    def num_accepted(self) -> int:
        return self._accepted

    @override
    def allows(self, token: int) -> bool:
        self.asked.append(token)
        return token in self._allowed

    @override
    def accept(self, token: int) -> bool:
        self._accepted += token in self._allowed
        return token in self._allowed

    @override
    def rollback(self, count: int) -> None:
        check_rollback(count, self._accepted)
        self._accepted -= count

    @override
    def mask(self) -> Bitmask | None:
        return None

    @override
    def full_mask(self) -> Bitmask:
        self.masks += 1
        return pack(self._allowed, self._vocab_size)

    @override
    def complete(self) -> bool:
        return False

    @override
    def reset(self) -> None:
        self._accepted = 0

    @override
    def fork(self) -> SetConstraint:
        copy = SetConstraint(list(self._allowed), self._vocab_size)
        copy._accepted = self._accepted
        return copy


def orders(p: NDArray[np.float64]) -> Iterator[tuple[tuple[int, ...], float]]:
    """Yield every order of a draw without replacement from ``p`` with its probability."""

    def extend(order: tuple[int, ...], left: frozenset[int], weight: float) -> Any:
        if not left:
            yield order, weight
            return
        mass = sum(p[i] for i in left)
        for i in left:
            yield from extend((*order, i), left - {i}, weight * p[i] / mass)

    yield from extend((), frozenset(np.flatnonzero(p).tolist()), 1.0)


def times_of(order: Sequence[int], size: int) -> NDArray[np.float64]:
    """Return arrival times ``float64[size]`` that make a race come in as ``order``."""
    times = np.full(size, np.inf)
    times[list(order)] = np.arange(len(order), dtype=float)
    return times
