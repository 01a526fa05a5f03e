# SPDX-License-Identifier: Apache-2.0
"""DySpec's layer-wise growth (arXiv 2410.11744, algorithm 2) with a draft model, over a batch.

The paper asks the model for a whole level at once, namely for every leaf whose path value

    v(node) = prod over the path of q(token | context)

exceeds a threshold, so a tree costs as many passes as it is deep and not as many as it has nodes.
Here q is the mixture of the model with the sources that need no pass, a level may hold a path
that those sources proposed in one go, and the threshold follows from time. With S the sum of the n
best values found so far, t the seconds spent on passes, c(rows) the latency of the target and d(m)
that of a pass over m nodes, the m most valuable open nodes are asked about for the m that maximises

    (base_tokens + S + h * (v_1 + ... + v_m)) / (c(base_rows + n + m) + t + d(m))

where h, learned online, is the share of a node's value that its best child keeps. m = 0 ends the
growth. Whether the model is asked at all is decided by a `Gate` over what it added lately; while
that is closed a trial asks about few requests, and the others are taken to fare alike. Requests
differ, so each new one is worth a trial, as far as there is time for it: a small share of all time,
and part of what the model has saved so far.

The nodes are named, not drawn, so nothing here can bend the target's law.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from proposers.dyspec import DySpec, DySpecOptions, Growth, grow
from proposers.gate import RARELY, Gate
from proposers.grower import Draftee, fewer
from proposers.levels import FAIR_DEBT, LevelNode, LevelPredictor, ModelSource
from proposers.mixture import Bias, Mixture, Prediction
from proposers.source import Candidates, Source, State
from proposers.step_cost import StepCost
from proposers.tree import ROOT, TokenTree

_KEPT_AT_FIRST = 0.7
_KEPT_RATE = 0.1

_TRIAL_DEBT = 64
"""Most tokens that a trial of a closed gate reads, unless one request alone has more."""

_READING_SHARE = 0.005
"""Of the time for trials and for reading texts: one that has to read a long prompt is rarer."""

_AT_FIRST = 4.0
"""Steps without prompts whose time such reading may take before anything was saved, once."""

_REINVESTED = 0.25
"""Of the time that the model saves, into reading the texts of new requests."""

_EARNED_IN = 64
"""Steps: requests are taken to have at least so many before them."""


class _Contexts:
    """The contexts of one request and step that were asked about, each predicted once.

    Growing a tree anew after each pass costs little, because only what a pass has changed is
    predicted again. Contexts are numbered like nodes, ``ROOT`` being the committed text, and stay
    the same from growth to growth.
    """

    __slots__ = ("_children", "_mixture", "_model", "_predictions", "_states", "found", "nodes")

    def __init__(self, mixture: Mixture, model: int, root: list[State]) -> None:
        self._mixture = mixture
        self._model = model  # the model's place among the sources
        self._states: dict[int, list[State]] = {ROOT: root}
        self._children: dict[tuple[int, int], int] = {}
        self._predictions: dict[int, Prediction] = {}
        self.nodes: list[tuple[int, int]] = []  # (parent, token)
        self.found: set[int] = set()

    def child(self, parent: int, token: int) -> int:
        node = self._children.get((parent, token))
        if node is None:
            node = self._children[parent, token] = len(self.nodes)
            self.nodes.append((parent, token))
        return node

    def tell(self, node: int, found: Candidates) -> None:
        """What the model says after a context."""
        source: Any = self._mixture.sources[self._model]
        source.tell(self._states_of(node)[self._model], found)
        self._predictions.pop(node, None)
        self.found.add(node)

    def predict(self, node: int, greedy: bool, bias: Bias | None) -> Prediction:
        prediction = self._predictions.get(node)
        if prediction is None:
            prediction = self._mixture.predict(self._states_of(node), greedy, bias)
            self._predictions[node] = prediction
        return prediction

    def _states_of(self, node: int) -> list[State]:
        states = self._states.get(node)
        if states is None:
            parent, token = self.nodes[node]
            states = self._mixture.advance(self._states_of(parent), token)
            self._states[node] = states
        return states


class _Growth(Growth):
    """A growth that looks its predictions up in the contexts of its request."""

    __slots__ = ("contexts", "place", "request")

    def __init__(self, draftee: Draftee, contexts: _Contexts, bias: Bias) -> None:
        super().__init__(
            [], greedy=draftee.greedy, chain=draftee.chain, limit=draftee.limit, bias=bias
        )
        self.request = draftee.request
        self.contexts = contexts
        self.place: dict[int, int] = {ROOT: ROOT}  # context of each node

    def expand(self, node: int, mixture: Mixture) -> Prediction:
        """As the base class, predicting each context once."""
        prediction = self.contexts.predict(self.place[node], self.greedy, self.bias)
        self.predictions[node] = prediction
        return prediction

    def add(self, parent: int, token: int, prob: float) -> int:
        """As the base class."""
        node = super().add(parent, token, prob)
        self.place[node] = self.contexts.child(self.place[parent], token)
        return node


class Layerwise(DySpec):
    """Grows trees from a draft model and other sources.

    Args:
        predictor: the model.
        sources: mixed with it; may be empty.
        options: limits.
        free: whether passes cost nothing and the model is asked in every step, for engines that
            size their trees by the options alone.

    Attributes:
        gate: of the latest step, if there is any.
    """

    def __init__(
        self,
        predictor: LevelPredictor,
        sources: Sequence[Source],
        options: DySpecOptions,
        *,
        free: bool = False,
    ) -> None:
        super().__init__(Mixture([ModelSource(), *sources]), options)
        self._predictor = predictor
        self._free = free
        self.gate: Gate | None = None
        # A batch of one may want the model and one of eight not: one gate for both would open at
        # the end of each group, and let the next one read all its prompts before it closes.
        self._gates: dict[int, Gate] = {}  # by the requests of the batch, doubling
        self._kept = {True: _KEPT_AT_FIRST, False: _KEPT_AT_FIRST}  # h, by greedy
        self._passes: list[int] = []  # rows of each pass of this step
        self._allowance = 0.0  # seconds that trials and long texts may take now
        self._asked: set[str] = set()  # requests that the model was asked about

    def grow(
        self,
        draftees: Sequence[Draftee],
        cost: StepCost,
        *,
        base_rows: int,
        base_tokens: float,
        most: int | None = None,
    ) -> list[TokenTree]:
        """See `Grower.grow`."""
        self.spent = 0.0
        wanted = [draftee.request for draftee in draftees if draftee.limit]
        asked = self._asked_about(draftees, wanted, cost, base_rows, base_tokens)
        if not asked:
            return super().grow(
                draftees, cost, base_rows=base_rows, base_tokens=base_tokens, most=most
            )
        contexts = [
            _Contexts(self.mixture, 0, self.mixture.root(draftee.request)) for draftee in draftees
        ]

        def grown() -> tuple[list[_Growth], list[TokenTree]]:
            growths = [self._begin(d, c) for d, c in zip(draftees, contexts, strict=True)]
            trees = grow(
                growths,
                self.mixture,
                cost,
                self._options,
                base_rows=base_rows,
                base_tokens=base_tokens,
                spent=self.spent,
                most=most,
            )
            return growths, trees

        growths, trees = grown()
        without = trees
        self._passes = []
        self._charge(sum(min(self._predictor.debt(request), FAIR_DEBT) for request in asked))
        reading = self.spent
        self._asked.update(asked)
        closed = self.gate is not None and not self.gate.is_open
        roots = self._predictor.begin(asked, trial=closed or len(asked) < len(wanted))
        for draftee, context in zip(draftees, contexts, strict=True):
            if draftee.request in roots:
                context.tell(ROOT, roots[draftee.request])
        if roots and not self._free:
            self.spent += self._predictor.slowdown()
        room = fewer(self._options.max_batch_nodes, most)
        latency = cost.curve(base_rows + room)[base_rows:].tolist()
        for _ in range(self._options.max_depth if roots else 0):
            growths, trees = grown()
            level = self._level(growths, trees, latency, base_tokens)
            if not level:
                break
            self._charge(len(level))
            self._ask(growths, level)
        else:
            growths, trees = grown()
        if self.gate is not None:
            names = set(asked)
            chosen = [i for i, draftee in enumerate(draftees) if draftee.request in names]
            spent = self._spent_on(len(wanted) / len(asked))
            before = cost.gain(base_rows, _as_if(without, chosen))
            after = cost.gain(base_rows, _as_if(trees, chosen), spent)
            if closed:
                self._allowance -= self.spent - reading
            gain = (1.0 + after) / (1.0 + before) - 1.0
            step, usual = _times(cost, base_rows, base_tokens)
            if base_rows == len(draftees) and self.gate.decide(gain, base_rows):
                saved = _REINVESTED * max(0.0, self.gate.gain) * step
                self._allowance = max(
                    self._allowance, min(self._allowance + saved, _EARNED_IN * usual)
                )
            if closed:  # it was paid for here, and says nothing of the other sources
                self.spent = cost.worth(base_rows, trees, cost.gain(base_rows, without))
        return trees

    def _asked_about(
        self,
        draftees: Sequence[Draftee],
        wanted: Sequence[str],
        cost: StepCost,
        base_rows: int,
        base_tokens: float,
    ) -> Sequence[str]:
        """The requests that the model is asked about in this step, of those that want a tree."""
        if self._free:
            return wanted
        step, usual = _times(cost, base_rows, base_tokens)
        self._allowance += _READING_SHARE * step if self._gates else _AT_FIRST * usual
        self.gate = self._gate(len(draftees))
        asked = wanted
        if base_rows > len(draftees):  # what pays beside a prompt says nothing of other steps
            asked = wanted if self.gate.is_open else []
        elif wanted and not self.gate.wants_draft(base_rows):
            asked = [] if self.gate.is_open else [r for r in wanted if r not in self._asked]
        left = {draftee.request: draftee.left for draftee in draftees}
        return self._affordable(asked, left, usual)

    def _gate(self, count: int) -> Gate:
        """The gate for batches of so many requests. Only the first one begins open: what another
        size brings is found out by a trial, which costs less than asking about all.
        """
        size = count.bit_length()
        if size not in self._gates:
            self._gates[size] = Gate(patience=RARELY, is_open=not self._gates)
        return self._gates[size]

    def stop(self, request: str) -> None:
        """See `Grower.stop`."""
        super().stop(request)
        self._asked.discard(request)

    def _affordable(self, wanted: Sequence[str], left: Mapping[str, int], step: float) -> list[str]:
        """The requests that may be asked about, those with less to read first; it is paid for.

        What has to be read beyond what one step is charged for must fit into what such reading may
        take, `_READING_SHARE` of the time and `_REINVESTED` of what was saved, or be earned back in
        `_EARNED_IN` steps, or in those that are left, at the gain that an open gate has seen. While
        it is closed, a trial asks about few requests.

        Args:
            wanted: the requests.
            left: most tokens that each may still get.
            step: seconds of one without drafts.
        """
        assert self.gate is not None
        is_open = self.gate.is_open
        earned = max(0.0, self.gate.gain) * step if is_open else 0.0
        chosen: set[str] = set()
        debt = rows = steps = 0
        price = 0.0
        for more, request in sorted((self._predictor.debt(name), name) for name in wanted):
            debt += more
            rows += max(0, more - FAIR_DEBT) if is_open else more
            steps += min(_EARNED_IN, left[request])
            seconds = self._predictor.seconds(rows) if rows else 0.0
            budget = self._allowance + earned * steps / (len(chosen) + 1)
            if seconds > budget or (chosen and not is_open and debt > _TRIAL_DEBT):
                break
            chosen.add(request)
            price = seconds
        # What is read on credit is not owed, but what a trial has overdrawn stays so.
        self._allowance = min(self._allowance, max(0.0, self._allowance - price))
        return [request for request in wanted if request in chosen]  # in the batch's order

    def _spent_on(self, share: float) -> float:
        """Seconds, had so many times the requests been asked about."""
        if share == 1.0:
            return self.spent
        passes = sum(self._predictor.seconds(round(rows * share)) for rows in self._passes)
        return passes + self._predictor.slowdown()

    def _begin(self, draftee: Draftee, contexts: _Contexts) -> _Growth:
        growth = _Growth(draftee, contexts, self._bias(draftee.request))
        self._growths[draftee.request] = growth
        return growth

    def _charge(self, rows: int) -> None:
        if not self._free and rows:
            self.spent += self._predictor.seconds(rows)
            self._passes.append(rows)

    def _level(
        self,
        growths: Sequence[_Growth],
        trees: Sequence[TokenTree],
        latency: Sequence[float],
        base_tokens: float,
    ) -> list[tuple[float, int, int]]:
        """The open nodes that pay another pass, as (value, growth, node), most valuable first."""
        rows = sum(map(len, trees))
        tokens = base_tokens + sum(sum(tree.probs) for tree in trees)
        best = tokens / (latency[rows] + self.spent)
        members = [growth.members(tree) for growth, tree in zip(growths, trees, strict=True)]
        level: list[tuple[float, int, int]] = []
        width = 0
        for value, index, node in self._open(growths):
            growth = growths[index]
            level.append((value, index, node))
            if node not in members[index]:
                tokens += value
                rows += 1
            hoped = self._kept[growth.greedy] * value
            if len(growth.tokens) < growth.limit:
                tokens += hoped
                rows += 1
            else:  # a child takes the place of the least valuable node
                tokens += max(0.0, hoped - growth.probs[-1])
            seconds = latency[min(rows, len(latency) - 1)] + self.spent
            if not self._free:
                seconds += self._predictor.seconds(len(level))
            if tokens / seconds > best:
                best, width = tokens / seconds, len(level)
        return level[:width]

    def _open(self, growths: Sequence[_Growth]) -> list[tuple[float, int, int]]:
        """The nodes that the model can be asked about, most valuable first, after their parents."""
        order: list[tuple[float, int, int]] = []
        for index, growth in enumerate(growths):
            if ROOT not in growth.contexts.found:
                continue
            order.extend(
                (-value, index, node)
                for node, value in enumerate(growth.probs)
                if growth.place[node] not in growth.contexts.found
                and growth.depths[node] < self._options.max_depth
            )
        order.sort()
        room: dict[int, int] = {}
        chosen: list[tuple[float, int, int]] = []
        for negative, index, node in order:
            if index not in room:
                room[index] = self._predictor.room(growths[index].request)
            # Values fall along a path and ties keep the order of growth, so what is left out for
            # want of room has no descendant before it.
            if room[index] > 0:
                room[index] -= 1
                chosen.append((-negative, index, node))
        return chosen

    def _ask(self, growths: Sequence[_Growth], level: Sequence[tuple[float, int, int]]) -> None:
        """One pass over a level."""
        nodes = []
        for _, index, node in level:
            growth = growths[index]
            place = growth.place[node]
            nodes.append(LevelNode(growth.request, place, *growth.contexts.nodes[place]))
        kept = {True: [0.0, 0.0], False: [0.0, 0.0]}
        answers = self._predictor.predict(nodes)
        for (value, index, node), found in zip(level, answers, strict=True):
            growth = growths[index]
            growth.contexts.tell(growth.place[node], found)
            probs = growth.contexts.predict(growth.place[node], growth.greedy, growth.bias).probs
            share = kept[growth.greedy]
            share[0] += value * min(1.0, max(probs.values(), default=0.0))
            share[1] += value
        for greedy, (children, parents) in kept.items():
            if parents > 0.0:
                self._kept[greedy] += _KEPT_RATE * (children / parents - self._kept[greedy])


def _times(cost: StepCost, base_rows: int, base_tokens: float) -> tuple[float, float]:
    """Seconds of this step without drafts, and of those to come: beside a long prompt one takes
    many times as long.
    """
    step = cost.seconds(base_rows)
    return step, min(step, cost.seconds(max(1, round(base_tokens))))


def _as_if(trees: Sequence[TokenTree], chosen: Sequence[int]) -> list[TokenTree]:
    """The trees of a batch where all requests fared like those chosen, one after the other."""
    return [trees[chosen[i % len(chosen)]] for i in range(len(trees))]
