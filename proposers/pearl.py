# SPDX-License-Identifier: Apache-2.0
"""PEARL (arXiv 2408.11850): drafting beside verification, as a `LevelPredictor`.

While the target verifies what was scheduled, the draft model goes on behind it as if all were going
to be accepted. With x a request's committed text, d_1 .. d_m the likeliest path of its scheduled
tree and c_0, c_1, ... what the model proposes greedily behind x d_1 .. d_m, beside the step:

* c_0 stands for the target's own token, which the walk of this package emits at the end of each
  path (the paper's rejection sampling does not, after a full acceptance). If d_1 .. d_m are
  accepted and that token is c_0, the model's candidates after c_0, c_1, ... are the next tree's,
  and no pass is waited for: the paper's POST state (post-verify).
* Otherwise the proposals are dropped, and the next step verifies nothing of the model's: PRE. With
  m = 0 the step verifies c_0 before all others (pre-verify).

So the draft length adapts by itself: a run of accepted tokens of any length is one uninterrupted
draft, and where the draft is wrong a step verifies nothing. In the paper drafts are chains; here
the candidates go to a grower, which adds siblings where they pay. A proposal never changes what the
target says, so the text is the target's whatever is proposed.

A request that nothing was drafted for beside the last step is drafted in line, as without PEARL:
at its first token, beside steps that are too short for two passes, and always where `Overlap` finds
that nothing is hidden beside a step or that too little of it is right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from proposers.levels import FAIR_DEBT, LevelNode, LevelPredictor
from proposers.overlap import Overlap, chunk_length
from proposers.source import Candidates
from proposers.tree import ROOT, TokenTree

PROBE_EVERY = 64
"""Steps after which one runs with nothing beside it, to measure the target alone."""


_FEWEST = 2
"""Passes beside a step: with one only c_0 would be known, and nothing could be scheduled."""

_FORGOTTEN = 0.99  # per step that is too short, so that a pass is timed again some day


class AssumingPredictor(LevelPredictor, Protocol):
    """A predictor that can read behind tokens that are not committed yet."""

    def assume(self, paths: Mapping[str, Sequence[int]]) -> None:
        """Take each request's committed text to go on with a path, until `settle`."""

    def settle(self, kept: Mapping[str, int]) -> None:
        """Of each request's assumed path so many leading tokens were committed."""


@dataclass(slots=True)
class Ahead:
    """What was drafted of one request beside a step.

    Attributes:
        path: tokens of the step's tree that are assumed to be accepted.
        found: the model's candidates after the path, after c_0, after c_1, ...
    """

    path: tuple[int, ...]
    found: list[Candidates] = field(default_factory=list)


@dataclass(slots=True)
class Tally:
    """Counts of drafting beside steps.

    Attributes:
        steps: with drafting beside them.
        passes: of the draft model in them.
        requests: summed over these steps.
        hits: of them, those whose proposals were right.
    """

    steps: int = 0
    passes: int = 0
    requests: int = 0
    hits: int = 0


class Pearl:
    """Answers from what was drafted beside the last step.

    Per step: `plan`, then `draft` in another thread while the target runs, then `settle`, then the
    calls of a `LevelPredictor`.

    Args:
        predictor: the draft model; nobody else may call it between `plan` and `settle`.
        most: longest continuation, in tokens.
        overlap: notices whether that pays beside a step; ``None`` drafts in line from the start.

    Attributes:
        overlap: as given.
        tally: counts; whoever reads it may put a new one in its place.
    """

    def __init__(self, predictor: AssumingPredictor, *, most: int, overlap: Overlap | None) -> None:
        self.overlap = overlap
        self.tally = Tally()
        self._predictor = predictor
        self._most = most
        self._wanted: list[str] = []  # requests that the grower asked about in the last step
        self._ahead: dict[str, Ahead] = {}
        self._drafted: set[str] = set()  # requests with a tree in the step
        self._passes = 0
        self._pass_seconds = 0.0
        self._since_probe = 0
        self._settled: dict[str, Ahead | None] = {}  # None: drafted beside, and wrong
        self._inline: set[str] = set()
        self._places: dict[str, dict[int, int]] = {}

    # -- beside the step --------------------------------------------------------------------------

    def plan(self, trees: Mapping[str, TokenTree], seconds: float) -> bool:
        """A step starts: decide what to draft beside it.

        Args:
            trees: what it verifies, by request of the batch.
            seconds: that it takes alone, by expectation.

        Returns:
            Whether to call `draft`.
        """
        self._ahead = {}
        if self.overlap is None:
            return False
        self._drafted = {request for request, tree in trees.items() if len(tree)}
        wanted = [request for request in self._wanted if request in trees]
        if not wanted:
            return False
        if not self.overlap.beside:
            self.overlap.skipped()
            return False
        self._since_probe += 1
        if self._since_probe > PROBE_EVERY:
            self._since_probe = 0
            return False
        each = self._pass_seconds or self._predictor.seconds(len(wanted))
        if _FEWEST * each > seconds:  # the step would wait for them
            self._pass_seconds = each * _FORGOTTEN
            return False
        self._passes = max(_FEWEST, chunk_length(seconds, each, self._most))
        self._ahead = {request: Ahead(main_path(trees[request])) for request in wanted}
        self._predictor.assume({request: ahead.path for request, ahead in self._ahead.items()})
        return True

    def draft(self, stopped: Callable[[], bool]) -> float:
        """Continue every planned request, greedily.

        Args:
            stopped: asked before each pass but the first two; true once the target has ended.

        Returns:
            Seconds that the passes would take alone.
        """
        begin = time.perf_counter()
        debt = sum(self._predictor.debt(request) for request in self._ahead)
        roots = self._predictor.begin(list(self._ahead))
        for request, found in roots.items():
            if found:
                self._ahead[request].found.append(found)
        alone = self._predictor.seconds(max(debt, len(roots)))
        passes = 1
        while passes < self._passes and not (passes >= _FEWEST and stopped()):
            level = [
                LevelNode(
                    request,
                    node=passes - 1,
                    parent=passes - 2 if passes > 1 else ROOT,
                    token=likeliest(ahead.found[-1]),
                )
                for request, ahead in self._ahead.items()
                if len(ahead.found) == passes and self._predictor.room(request) > 0
            ]
            if not level:
                break
            for node, found in zip(level, self._predictor.predict(level), strict=True):
                if found:
                    self._ahead[node.request].found.append(found)
            alone += self._predictor.seconds(len(level))
            passes += 1
        each = (time.perf_counter() - begin) / passes
        self._pass_seconds += (each - self._pass_seconds) / (8.0 if self._pass_seconds else 1.0)
        self.tally.steps += 1
        self.tally.passes += passes
        return alone

    def settle(self, emitted: Mapping[str, Sequence[int]]) -> None:
        """The step has ended.

        Args:
            emitted: by request, what it added to the text: the accepted path and a token of the
                target's own; requests that are not named have lost their text.
        """
        self._wanted = []
        self._settled = {}
        self._inline = set()
        if self.overlap is not None:
            for request in self._drafted & emitted.keys():
                self.overlap.verified(len(emitted[request]) - 1)
        self._drafted = set()
        kept = {}
        for request, ahead in self._ahead.items():
            tokens = list(emitted.get(request, ()))
            same = _agreement(ahead.path, tokens)
            kept[request] = same
            guess = [likeliest(found) for found in ahead.found[:1]]
            hit = same == len(ahead.path) and bool(guess) and tokens[same:] == guess
            self._settled[request] = ahead if hit else None
            self.tally.requests += 1
            self.tally.hits += hit
            if self.overlap is not None:
                self.overlap.judged(hit)
        self._ahead = {}
        if kept:
            self._predictor.settle(kept)

    def forget(self, request: str) -> None:
        """The request has ended or lost its blocks."""
        self._ahead.pop(request, None)
        self._settled.pop(request, None)
        self._places.pop(request, None)

    # -- LevelPredictor ---------------------------------------------------------------------------

    def begin(self, requests: Sequence[str], *, trial: bool = False) -> dict[str, Candidates]:
        """See `LevelPredictor.begin`; requests whose proposals were wrong are left out."""
        self._wanted = list(requests)
        self._inline = {request for request in requests if self._in_line(request)}
        answers = {}
        self._places = {}
        for request in requests:
            ahead = self._settled.get(request)
            if request not in self._inline and ahead is not None and len(ahead.found) > 1:
                answers[request] = ahead.found[1]
                self._places[request] = {ROOT: 0}
        if self._inline:
            inline = [request for request in requests if request in self._inline]
            answers.update(self._predictor.begin(inline, trial=trial))
        return answers

    def debt(self, request: str) -> int:
        """See `LevelPredictor.debt`."""
        return self._predictor.debt(request) if self._in_line(request) else 0

    def room(self, request: str) -> int:
        """See `LevelPredictor.room`."""
        if request in self._inline:
            return self._predictor.room(request)
        ahead = self._settled.get(request)
        return 0 if ahead is None else len(ahead.found) - 1 - len(self._places.get(request, ()))

    def predict(self, nodes: Sequence[LevelNode]) -> list[Candidates]:
        """See `LevelPredictor.predict`; only nodes on c_1, c_2, ... have candidates."""
        answers: list[Candidates] = [{}] * len(nodes)
        inline = [i for i, node in enumerate(nodes) if node.request in self._inline]
        if inline:
            found = self._predictor.predict([nodes[i] for i in inline])
            for i, candidates in zip(inline, found, strict=True):
                answers[i] = candidates
        for i, node in enumerate(nodes):
            ahead, places = self._settled.get(node.request), self._places.get(node.request)
            if node.request in self._inline or ahead is None or places is None:
                continue
            place = places.get(node.parent)
            if place is None or node.token != likeliest(ahead.found[place + 1]):
                continue
            if place + 2 < len(ahead.found):
                places[node.node] = place + 1
                answers[i] = ahead.found[place + 2]
        return answers

    def seconds(self, rows: int) -> float:
        """See `LevelPredictor.seconds`: nothing where all was drafted beside the step."""
        waited = self._inline or not self._settled
        return self._predictor.seconds(rows) if waited else 0.0

    def slowdown(self) -> float:
        """See `LevelPredictor.slowdown`: what drafting beside a step takes from it."""
        overlap = self.overlap
        return overlap.slowdown if overlap is not None and overlap.beside else 0.0

    def _in_line(self, request: str) -> bool:
        """Whether a request is drafted after the step: nothing was beside it, or it is far behind.

        A prompt is read once for a whole answer, and a long one would never end beside a step.
        """
        if request not in self._settled:
            return True
        return self._settled[request] is None and self._predictor.debt(request) > FAIR_DEBT


def main_path(tree: TokenTree) -> tuple[int, ...]:
    """Tokens of the path that takes the likeliest child at every node; the first of equals."""
    best: dict[int, int] = {}
    for node, parent in enumerate(tree.parents):
        if parent not in best or tree.probs[node] > tree.probs[best[parent]]:
            best[parent] = node
    path = []
    at = ROOT
    while at in best:
        at = best[at]
        path.append(tree.tokens[at])
    return tuple(path)


def likeliest(found: Candidates) -> int:
    """The most probable candidate, the smaller token of equals."""
    return max(found, key=lambda token: (found[token], -token))


def _agreement(path: Sequence[int], tokens: Sequence[int]) -> int:
    pairs = zip(path, tokens, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(path), len(tokens)))
