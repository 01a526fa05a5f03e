# SPDX-License-Identifier: Apache-2.0
"""The exact law of a randomised program, by following every branch of its decisions.

The programs are the library's own growers and verifications: their decisions go through a
`proposers.chance.Chance`, so nothing is modelled a second time here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from itertools import product
from typing import TypeVar

import numpy as np

from proposers.chance import Chance
from proposers.law import DraftLaw
from proposers.sampled_tree import LevelwiseGrowth, SampledTree, grow
from proposers.tree import ROOT
from proposers.verify_tree import Verification, verify

T = TypeVar("T", bound=Hashable)
Tokens = tuple[int, ...]


class Branch:
    """Follows a script of choices, then the first possible one, and notes the others.

    `uniform` gives the same numbers in every branch: what they decide must not matter.
    """

    def __init__(self, script: Sequence[int], seed: int) -> None:
        self.weight = 1.0
        self.others: list[list[int]] = []
        self._script = list(script)
        self._at = 0
        self._seed = seed
        self._uniforms: np.random.Generator | None = None

    def accept(self, probability: float) -> bool:
        kept = min(probability, 1.0)
        return self._choose([1.0 - kept, kept]) == 1

    def draw(self, weights: np.ndarray) -> int:
        assert weights.min() >= 0.0
        return self._choose((weights / weights.sum()).tolist())

    def uniform(self) -> float:
        if self._uniforms is None:
            self._uniforms = np.random.default_rng(self._seed)
        return float(self._uniforms.random())

    def _choose(self, probabilities: list[float]) -> int:
        if self._at == len(self._script):
            possible = [i for i, p in enumerate(probabilities) if p > 0.0]
            self.others += [[*self._script, i] for i in possible[1:]]
            self._script.append(possible[0])
        choice = self._script[self._at]
        self._at += 1
        self.weight *= probabilities[choice]
        return choice


def law_of(program: Callable[[Chance], T], seed: int = 0) -> dict[T, float]:
    law: dict[T, float] = defaultdict(float)
    scripts: list[list[int]] = [[]]
    while scripts:
        branch = Branch(scripts.pop(), seed)
        law[program(branch)] += branch.weight
        scripts += branch.others
    return dict(law)


class Model:
    """Next-token laws by prefix; `row` makes one from a generator of that prefix's own."""

    def __init__(self, row: Callable[[np.random.Generator], np.ndarray], seed: int) -> None:
        self._row = row
        self._seed = seed
        self._rows: dict[Tokens, np.ndarray] = {}
        self._laws: dict[Tokens, DraftLaw] = {}

    def __call__(self, prefix: Tokens) -> np.ndarray:
        if prefix not in self._rows:
            self._rows[prefix] = self._row(np.random.default_rng([self._seed, *prefix]))
        return self._rows[prefix]

    def draft(self, prefix: Tokens) -> DraftLaw:
        if prefix not in self._laws:
            self._laws[prefix] = DraftLaw.dense(self(prefix))
        return self._laws[prefix]


Growing = Callable[[SampledTree, Chance], LevelwiseGrowth]
Verifying = Callable[[SampledTree, Chance], Verification]


def path_of(tree: SampledTree, node: int) -> Tokens:
    path: list[int] = []
    while node != ROOT:
        path.append(tree.tokens[node])
        node = tree.parents[node]
    return tuple(reversed(path))


def drafted(draft: Model, growing: Growing, chance: Chance) -> SampledTree:
    tree = SampledTree()

    def distributions(pairs: Sequence[tuple[int, int]]) -> list[DraftLaw]:
        return [draft.draft(path_of(tree, node)) for _, node in pairs]

    grow([growing(tree, chance)], distributions)
    return tree


def emitted(tree: SampledTree, target: Model, verifying: Verifying, chance: Chance) -> Tokens:
    verification = verifying(tree, chance)
    verify(verification, lambda node: target(path_of(tree, node)))
    assert len(verification.path) == len(verification.tokens) - 1
    assert [tree.tokens[node] for node in verification.path] == verification.tokens[:-1]
    return tuple(verification.tokens)


def step_law(
    target: Model, draft: Model, growing: Growing, verifying: Verifying, seed: int = 0
) -> dict[Tokens, float]:
    """Law of the tokens that one step of drafting and verification emits."""
    return law_of(
        lambda chance: emitted(drafted(draft, growing, chance), target, verifying, chance), seed
    )


def bias(law: dict[Tokens, float], target: Model, depth: int) -> float:
    """Total variation between the target's law of `depth` tokens and that of the emitted ones,
    completed by the target.
    """
    vocab = len(target(()))
    total = 0.0
    for text in product(range(vocab), repeat=depth):
        conditional = [target(text[:i])[text[i]] for i in range(depth)]
        got = sum(
            law.get(text[:n], 0.0) * float(np.prod(conditional[n:])) for n in range(depth + 1)
        )
        got += sum(p for tokens, p in law.items() if len(tokens) > depth and tokens[:depth] == text)
        total += abs(got - float(np.prod(conditional)))
    return total / 2


def mean_tokens(law: dict[Tokens, float]) -> float:
    return sum(p * len(tokens) for tokens, p in law.items())
