# SPDX-License-Identifier: Apache-2.0
"""Trees drawn from a draft model, and the verification that fits each.

Every tree is drawn from the draft model's law under the request's own temperature, top-k, top-p and
min-p, cut to `WIDTH` tokens: any law is exact as long as it is the one drawn from, and this one is
close to the target's. How large the trees are is decided before a token is drawn. The tree is kept
until the request's text goes on, so that the rule which verifies it sees every draw, also those
that got no row.

=====  ===============================  ==============
rule   drawn by                         verified by
=====  ===============================  ==============
swor   by the option `draw`             `verify_swor`
kseq   `spectr.grow_chains`             `verify_kseq`
block  `specdec.grow_chain`             `verify_block`
=====  ===============================  ==============

Without replacement a tree is drawn by RSD-S (`beam`), RSD-C with branches at the root (`constant`),
in Sequoia's best shape for the acceptance measured by rank (`sequoia`), or as far as a draw is
worth a threshold (`dyspec`). The first two have as many nodes on each level as were decided on, the
others at most as many in all, on as many levels. Sequoia's table says what a size promises; for
the others it is reckoned as for the first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from proposers.chance import Chance, request_dice
from proposers.dyspec_sampled import grow_threshold
from proposers.gate import RARELY, Gate
from proposers.law import DraftLaw
from proposers.levels import FAIR_DEBT, LevelNode
from proposers.rsd import grow_constant, grow_stochastic_beam
from proposers.sampled_size import NO_TREE, AcceptanceByRank, SizeByExpectation
from proposers.sampled_tree import LevelwiseGrowth, SampledTree, grow
from proposers.sequoia import OptimalTemplates, grow_template
from proposers.specdec import grow_chain
from proposers.spectr import grow_chains
from proposers.step_cost import StepCost
from proposers.tree import ROOT, TokenTree
from proposers.verify_block import BlockWalk
from proposers.verify_kseq import kseq
from proposers.verify_swor import swor
from proposers.verify_tree import TreeWalk, Verification
from vllm_ext.worker.draft_predictor import TopRow

WIDTH = 128
"""Tokens that a node's children are drawn from."""

_DRAFTING, _VERIFYING = 0, 1  # streams of a request's dice
_WIDTHS = (1, 2, 3, 4, 6, 8)

Rule: TypeAlias = Literal["swor", "kseq", "block"]
Draw: TypeAlias = Literal["beam", "constant", "sequoia", "dyspec"]

_templates = lru_cache(maxsize=64)(OptimalTemplates)


class RowPredictor(Protocol):
    """What is asked of `draft_predictor.DraftPredictor`."""

    def begin_rows(self, requests: Sequence[str], width: int) -> dict[str, TopRow]:
        """What follows each request's text; requests that cannot be read are left out."""

    def predict_rows(self, nodes: Sequence[LevelNode], width: int) -> list[TopRow | None]:
        """What follows each node."""

    def debt(self, request: str) -> int:
        """Tokens that `begin_rows` would have to read."""

    def room(self, request: str) -> int:
        """How many more nodes of the request `predict_rows` can take."""

    def seconds(self, rows: int) -> float:
        """Expected time of a pass."""


@dataclass(frozen=True, slots=True)
class Applicant:
    """A request that may have a drawn tree.

    Attributes:
        request: its id.
        params: vLLM's ``SamplingParams``; not greedy.
        position: number of its output tokens.
        limit: most nodes, at least 1.
        chain: whether only a path without branches can be verified.
    """

    request: str
    params: Any
    position: int
    limit: int
    chain: bool


@dataclass(frozen=True, slots=True)
class _Drawn:
    tree: SampledTree
    position: int
    width: int
    promised: float


class SampledDrafting:
    """Draws the trees of a batch, and keeps them until they are verified.

    Args:
        rule: of verification.
        predictor: the draft model.
        draw: how trees of the rule swor are drawn.
        seed: of the engine.
        max_depth: most levels of a tree.
        max_batch_nodes: most nodes of a step, as for named trees.
        adaptive: whether trees are sized, and left out, by cost.
    """

    def __init__(
        self,
        rule: Rule,
        predictor: RowPredictor,
        *,
        draw: Draw = "beam",
        seed: int,
        max_depth: int,
        max_batch_nodes: int,
        adaptive: bool,
    ) -> None:
        self._rule = rule
        self._how = draw
        self._predictor = predictor
        self._seed = seed
        self._max_batch_nodes = max_batch_nodes
        self._adaptive = adaptive
        self._gate = Gate(patience=RARELY) if adaptive else None
        self._size = SizeByExpectation((1,) if rule == "block" else _WIDTHS, max_depth)
        self._max_depth = max_depth
        self._ranks = AcceptanceByRank(_WIDTHS[-1])
        self._best: OptimalTemplates | None = None
        self._drawn: dict[str, _Drawn] = {}

    def propose(
        self,
        applicants: Sequence[Applicant],
        cost: StepCost,
        *,
        base_rows: int,
        base_tokens: float,
        most: int,
    ) -> dict[str, TokenTree]:
        """Draw a tree for each applicant, or for none if that does not pay.

        Args:
            applicants: of the batch.
            cost: of the target, by rows.
            base_rows: rows of the next step without drafts.
            base_tokens: tokens that they yield.
            most: nodes over all requests that the step has room for.

        Returns:
            The trees as the engine schedules them. Applicants without one, because the draft model
            cannot read them or does not pay, may have a named tree.
        """
        self._size.forget()
        self._ranks.forget()
        for applicant in applicants:
            self._drawn.pop(applicant.request, None)
        budget = min(self._max_batch_nodes, most)
        applicants = applicants[: max(0, budget)]
        if not applicants or (self._gate is not None and not self._gate.wants_draft(base_rows)):
            return {}
        size = min(max(a.limit for a in applicants), budget // len(applicants))
        debt = sum(min(self._predictor.debt(a.request), FAIR_DEBT) for a in applicants)
        if self._rule == "swor" and self._how == "sequoia":
            self._best = _templates(self._ranks.values, size, self._max_depth)
        shape, gain = self._size.choose(
            cost,
            self._predictor.seconds if self._adaptive else lambda rows: 0.0,
            base_rows=base_rows,
            base_tokens=base_tokens,
            requests=len(applicants),
            size=size,
            debt=debt,
            promise=self._promise,
        )
        if self._gate is not None and not self._gate.decide(gain, base_rows):
            return {}
        return self._draw(applicants, shape.width, shape.depth) if shape != NO_TREE else {}

    def verification(
        self, request: str, params: Any, position: int, scheduled: TokenTree, *, as_it_goes: bool
    ) -> Verification | None:
        """How to verify a request's step, or ``None`` if no tree was drawn for it.

        Args:
            request: its id.
            params: vLLM's ``SamplingParams``.
            position: number of its output tokens.
            scheduled: the nodes that have rows.
            as_it_goes: whether each token must be known before the next one's law is asked for;
                then a block is verified token by token.
        """
        drawn = self._drawn.get(request)
        if drawn is None or drawn.position != position:
            return None
        # A tree that got no rows, or not as it was drawn, is still verified: that it got none may
        # have to do with its tokens (a grammar that forbids the first), and then a fresh draw of
        # the next token would be biased.
        rows = len(scheduled)
        if drawn.tree.tokens[:rows] != list(scheduled.tokens) or drawn.tree.parents[:rows] != list(
            scheduled.parents
        ):
            rows = 0
        dice = request_dice(self._seed_of(request, params), position, _VERIFYING)
        if self._rule == "block" and not as_it_goes:
            return BlockWalk(drawn.tree, dice, rows=rows)
        rule = kseq if self._rule == "kseq" else swor  # which is the ratio rule on a chain
        return TreeWalk(drawn.tree, rule, dice, rows=rows)

    def learn(self, request: str, tokens: Sequence[int], path: Sequence[int]) -> None:
        """Tell the outcome of a verification.

        Args:
            request: its id.
            tokens: that were emitted.
            path: the accepted nodes, one fewer.
        """
        if not self._adaptive:  # a seed then gives the same trees again
            return
        drawn = self._drawn[request]
        tree = drawn.tree
        self._size.settle(drawn.promised, len(path))
        for level, (node, token) in enumerate(zip((ROOT, *path), tokens, strict=True)):
            drafted = [tree.tokens[child] for child in tree.draws.get(node, ())]
            if drafted:
                accepted = token in drafted
                tried = drafted.index(token) + 1 if accepted else len(drafted)
                self._ranks.learn(tried, accepted)
                self._size.learn(
                    tried,
                    accepted,
                    width=drawn.width,
                    level=level,
                    draws=len(drafted),
                )

    def stop(self, request: str) -> None:
        """Forget a request; unknown ones are ignored."""
        self._drawn.pop(request, None)

    def _draw(
        self, applicants: Sequence[Applicant], width: int, depth: int
    ) -> dict[str, TokenTree]:
        answers = self._predictor.begin_rows([a.request for a in applicants], WIDTH)
        readable = [a for a in applicants if a.request in answers]
        growths, drawn = [], []
        for applicant in readable:
            request, tree = applicant.request, SampledTree()
            wide = 1 if applicant.chain else min(width, applicant.limit)
            # The last level is not asked what follows it.
            room = max(0, self._predictor.room(request))
            deep = min(depth, applicant.limit // wide, 1 + room // wide)
            seed = self._seed_of(request, applicant.params)
            dice = request_dice(seed, applicant.position, _DRAFTING)
            growths.append(self._growth(tree, wide, deep, room, dice))
            drawn.append(_Drawn(tree, applicant.position, wide, self._promise(wide, deep)))

        def laws(pairs: Sequence[tuple[int, int]]) -> list[DraftLaw]:
            nodes = []
            for index, node in pairs:
                if node != ROOT:
                    tree, request = drawn[index].tree, readable[index].request
                    nodes.append(LevelNode(request, node, tree.parents[node], tree.tokens[node]))
            found = iter(self._predictor.predict_rows(nodes, WIDTH) if nodes else ())
            made = []
            for index, node in pairs:
                applicant = readable[index]
                row = answers[applicant.request] if node == ROOT else next(found)
                assert row is not None  # trees branch only where the predictor answers them all
                made.append(draft_law(*row, applicant.params))
            return made

        grow(growths, laws)
        for applicant, one in zip(readable, drawn, strict=True):
            self._drawn[applicant.request] = one
        return {a.request: d.tree.token_tree() for a, d in zip(readable, drawn, strict=True)}

    def _promise(self, width: int, depth: int) -> float:
        """Tokens that a tree of this size is expected to add to its step."""
        if self._best is None or width == 1:
            return self._size.expected(width, depth)
        return self._best.accepted(width * depth, depth)

    def _growth(
        self, tree: SampledTree, width: int, depth: int, room: int, dice: Chance
    ) -> LevelwiseGrowth:
        """A tree of at most `width` times `depth` nodes on `depth` levels.

        Args:
            tree: an empty tree, which is filled.
            width: nodes per level; 1 is a chain, whoever draws it.
            depth: levels.
            room: nodes of which can be asked what follows; it suffices for all levels but one.
            dice: decisions.
        """
        if self._rule == "block":
            return grow_chain(tree, 1.0, depth, dice)
        if self._rule == "kseq":
            return grow_chains(tree, width, depth, dice)
        if width == 1 or self._how == "beam":
            return grow_stochastic_beam(tree, width, depth, dice)
        if self._how == "constant":
            return grow_constant(tree, (width, *[1] * (depth - 1)), dice)
        size = width * depth if depth == 1 else min(width * depth, room)
        if self._best is not None:
            return grow_template(tree, self._best.template(size, depth), dice)
        return grow_threshold(tree, 1.0 / size, depth, size, dice)

    def _seed_of(self, request: str, params: Any) -> int:
        """The request's own seed, or one that nobody else has."""
        if params.seed is not None:
            return int(params.seed)
        name = f"{self._seed}/{request}".encode()
        return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def draft_law(ids: Any, probs: Any, params: Any) -> DraftLaw:
    """The draft's law under a request's sampling options.

    Args:
        ids: int64 [K], likeliest first.
        probs: float32 [K], at temperature 1.
        params: vLLM's ``SamplingParams``.
    """
    weights = (probs.astype(np.float64) / float(probs[0])) ** (1.0 / params.temperature)
    kept = int((weights >= params.min_p).sum())
    if params.top_k > 0:
        kept = min(kept, params.top_k)
    if params.top_p < 1.0:
        sums = np.cumsum(weights[:kept])
        kept = min(kept, int(np.searchsorted(sums, params.top_p * sums[-1])) + 1)
    return DraftLaw.of(ids[:kept], weights[:kept])
