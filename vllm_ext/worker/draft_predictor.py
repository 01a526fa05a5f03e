# SPDX-License-Identifier: Apache-2.0
"""The draft model as a predictor of levels: what it has read, and where its drafts lie.

``begin`` catches up: the tokens that requests committed since the model last ran, all requests in
one pass, whatever kept it from running (a step without drafts, a prompt in chunks, a preemption).
``predict`` appends a level of nodes behind the committed text: node j of a request occupies slot
``n + j``, where n is the length of the text, and is overwritten by the next catch-up. Accepted
nodes that lie where the text has them are not read again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from proposers.cost_model import CostModel
from proposers.levels import LevelNode
from proposers.source import Candidates
from proposers.tree import ROOT, TokenTree
from vllm_ext.worker.draft_ledger import DraftLedger
from vllm_ext.worker.draft_model import DraftModel, DraftRows

WIDTH = 16
"""Candidates per node."""

TopRow: TypeAlias = tuple[NDArray[np.int64], NDArray[np.float32]]
"""Tokens [width] and their probabilities at temperature 1, likeliest first."""

_MOST_NODES = 127  # rows of a tree that the kernels take, less the root
_NEGLIGIBLE = 1e-4
_BETWEEN_RATE = 0.05
_LONGEST_BETWEEN = 0.02  # a longer pause is not growth
_TIMED = 64  # rows; the cost of a prompt says nothing about that of a level


@dataclass(slots=True)
class _Text:
    """What the model has of one request.

    Attributes:
        done: leading tokens whose keys and values are in place.
        drafted: tokens behind them that are in place if they turn out to be the text.
        length: tokens of the text when it was last read.
        places: index of each node of this step among its nodes.
        tokens: of the nodes.
        parents: index of each node's parent among the nodes, or ``ROOT``.
    """

    done: int = 0
    drafted: list[int] = field(default_factory=list)
    length: int = 0
    places: dict[int, int] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)

    def clear(self) -> None:
        """Forget the nodes."""
        self.places, self.tokens, self.parents, self.drafted = {ROOT: ROOT}, [], [], []

    def path(self, node: int) -> list[int]:
        """Indices of the nodes from the root to ``node``."""
        path = []
        while node != ROOT:
            path.append(node)
            node = self.parents[node]
        return path[::-1]


class DraftPredictor:
    """A `LevelPredictor` over a draft model and vLLM's batch.

    Args:
        model: bound to its KV cache.
        runner: the model runner.
        branching: whether its attention can verify trees; otherwise a request has one path.
        partial: whether tree attention takes the new rows of a tree alone; otherwise all of them
            are computed again with each level.
        cost: of a pass by rows.

    Attributes:
        prompts: unfinished prompts that `begin` reads along, with their computed tokens.
        around: seconds so far of what goes on around passes, by expectation: growth of trees.
    """

    def __init__(
        self, model: DraftModel, runner: Any, *, branching: bool, partial: bool, cost: CostModel
    ) -> None:
        self._model = model
        self._runner = runner
        self._branching = branching
        self._partial = partial
        self._cost = cost
        self._longest = min(model.max_model_len, runner.max_model_len)
        self._texts: dict[str, _Text] = {}
        self._assumed: dict[str, tuple[int, Sequence[int]]] = {}  # committed length, path
        self.ledger = DraftLedger(model.table.block_size)
        self._ended = 0.0  # the latest pass
        self._between = 0.0  # seconds
        self.around = 0.0
        self.prompts: Mapping[str, int] = {}
        self._beside = False

    def forget(self, request: str) -> None:
        """The request has ended, or has lost its blocks."""
        self._texts.pop(request, None)
        self._assumed.pop(request, None)

    def assume(self, paths: Mapping[str, Sequence[int]]) -> None:
        """See `AssumingPredictor.assume`.

        Passes are made beside the target's until `settle`, possibly in another thread.
        """
        self._beside = True
        self._assumed = {r: (self._text(r)[1].size, path) for r, path in paths.items()}

    def settle(self, kept: Mapping[str, int]) -> None:
        """See `AssumingPredictor.settle`."""
        self._beside = False
        for request, same in kept.items():
            length, path = self._assumed.pop(request, (0, ()))
            text = self._texts.get(request)
            if text is not None and same < len(path):
                text.done = min(text.done, length + same)
                text.drafted = []
        self._assumed = {}

    def begin(self, requests: Sequence[str], *, trial: bool = False) -> dict[str, Candidates]:
        """See `LevelPredictor.begin`."""
        found = self.begin_rows(requests, WIDTH, trial=trial)
        return {request: _candidates(row) for request, row in found.items()}

    def begin_rows(
        self, requests: Sequence[str], width: int, *, trial: bool = False
    ) -> dict[str, TopRow]:
        """As `begin`, with the `width` most probable tokens, likeliest first."""
        wanted = [request for request in requests if self._usable(request, None)]
        reading = [(request, *self._text(request)) for request in wanted]
        along: Mapping[str, int] = {} if self._beside or trial else self.prompts
        for request, computed in along.items():
            if self._usable(request, computed):
                row, tokens = self._text(request)
                reading.append((request, row, tokens[:computed]))
        spans = []
        for index, (request, row, tokens) in enumerate(reading):
            text = self._known(request, row, tokens)
            # The last token is always read: it is what the candidates follow.
            begin = min(text.done, len(tokens) - 1) if index < len(wanted) else text.done
            spans.append((begin, len(tokens)))
        answers: dict[str, TopRow] = {}
        for parts in packed(spans, self._runner.max_num_tokens):
            rows = []
            owners = []
            for index, start, end in parts:
                request, row, tokens = reading[index]
                last = index < len(wanted) and end == len(tokens)
                rows.append(DraftRows(row, start, tokens[start:end].tolist(), int(last)))
                if last:
                    owners.append(request)
            answers.update(zip(owners, zip(*self._run(rows, width), strict=True), strict=True))
            for index, start, end in parts:
                request, row, tokens = reading[index]
                self.ledger.wrote(tokens, self._blocks(row), start, end)
                self._texts[request].done = end
        return answers

    def debt(self, request: str) -> int:
        """See `LevelPredictor.debt`."""
        text = self._texts.get(request)
        return self._text(request)[1].size - (text.done if text is not None else 0)

    def room(self, request: str) -> int:
        """See `LevelPredictor.room`."""
        text = self._texts[request]
        row = self._runner.input_batch.req_id_to_index[request]
        slots = min(self._slots(row), self._longest) - text.length
        return int(min(slots, _MOST_NODES)) - len(text.tokens)

    def predict(self, nodes: Sequence[LevelNode]) -> list[Candidates]:
        """See `LevelPredictor.predict`."""
        rows = self.predict_rows(nodes, WIDTH)
        return [{} if row is None else _candidates(row) for row in rows]

    def predict_rows(self, nodes: Sequence[LevelNode], width: int) -> list[TopRow | None]:
        """As `predict`, with the `width` most probable tokens, likeliest first; ``None`` where
        `predict` answers nothing.
        """
        by_request: dict[str, list[LevelNode]] = {}
        for node in nodes:
            text = self._texts[node.request]
            text.places[node.node] = len(text.tokens)
            text.tokens.append(node.token)
            text.parents.append(text.places[node.parent])
            by_request.setdefault(node.request, []).append(node)
        parts: list[DraftRows] = []
        order: list[tuple[str, int]] = []
        for request, asked in by_request.items():
            part, answered = self._level(request, asked)
            parts.append(part)
            order.extend((request, node) for node in answered)
        self._note_between()
        found = dict(zip(order, zip(*self._run(parts, width), strict=True), strict=True))
        return [found.get((node.request, node.node)) for node in nodes]

    def seconds(self, rows: int) -> float:
        """See `LevelPredictor.seconds`: of a pass, and of the growth that its answers cause."""
        return self._cost.seconds(rows) + self._between

    def slowdown(self) -> float:
        """See `LevelPredictor.slowdown`: passes are in line."""
        return 0.0

    def _level(self, request: str, asked: Sequence[LevelNode]) -> tuple[DraftRows, list[int]]:
        """Rows for the nodes just added to a request's text, and the nodes that they answer."""
        text = self._texts[request]
        row, tokens = self._text(request)
        length, count, new = text.length, len(text.tokens), len(asked)
        if not self._branching:
            return self._path(text, row, asked)
        blocks = self._blocks(row)
        self.ledger.scribbled(blocks, length, length + count)
        in_line = next(
            (i for i, parent in enumerate(text.parents) if parent != i - 1), count
        )  # nodes that follow each other are where the text would have them
        text.drafted = text.tokens[:in_line]
        nodes = [node.node for node in asked]
        if in_line == count:
            return DraftRows(row, length + count - new, text.tokens[count - new :], new), nodes
        tree = TokenTree(tuple(text.tokens), tuple(text.parents), (0.0,) * count)
        if self._partial:
            first = 1 + count - new
            start = length - 1 + first
            return DraftRows(row, start, text.tokens[count - new :], new, tree, first), nodes
        return DraftRows(row, length - 1, [int(tokens[-1]), *text.tokens], new, tree), nodes

    def _path(
        self, text: _Text, row: int, asked: Sequence[LevelNode]
    ) -> tuple[DraftRows, list[int]]:
        """Without tree attention: the path to the last node, as far as it is not in place."""
        places = text.path(text.places[asked[-1].node])
        path = [text.tokens[place] for place in places]
        answers = {text.places[node.node]: node.node for node in asked}
        answered = [answers[place] for place in places if place in answers]
        same = min(agreement(path, text.drafted), len(path) - len(answered))
        text.drafted = path
        start = text.length + same
        self.ledger.scribbled(self._blocks(row), start, text.length + len(path))
        return DraftRows(row, start, path[same:], len(answered)), answered

    def _known(self, request: str, row: int, tokens: NDArray[np.int32]) -> _Text:
        """A request's text, advanced over drafted tokens that were accepted where they lie."""
        text = self._texts.get(request)
        if text is None or text.done > len(tokens):
            text = self._texts[request] = _Text(self.ledger.valid(tokens, self._blocks(row)))
        accepted = agreement(text.drafted, tokens[text.done :].tolist())
        if accepted:
            end = text.done + accepted
            self.ledger.wrote(tokens, self._blocks(row), text.done, end)
            text.done = end
        text.length = len(tokens)
        text.clear()
        return text

    def _usable(self, request: str, computed: int | None) -> bool:
        """Whether the model can read a request's text."""
        state = self._runner.requests[request]
        if state.prompt_token_ids is None or getattr(state, "mm_features", None):
            return False  # embeddings and images have no tokens that it could read
        row, tokens = self._text(request)
        length = tokens.size if computed is None else computed
        if not 0 < length <= min(self._slots(row), self._longest):
            return False
        text = self._texts.get(request)
        unread = tokens[text.done if text is not None else 0 :]
        return bool((unread < self._model.vocab_size).all() and (unread >= 0).all())

    def _run(
        self, parts: Sequence[DraftRows], width: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        before = self._model.seconds
        found = self._model.run(parts, width, beside=self._beside)
        rows = sum(len(part.tokens) for part in parts)
        if not self._beside:
            if rows <= _TIMED:
                self._cost.record(rows, self._model.seconds - before)
            self.around += self._between
            self._ended = time.perf_counter()
        return found

    def _note_between(self) -> None:
        """Take the time since the latest pass for what goes on around one."""
        if not self._beside:
            seconds = time.perf_counter() - self._ended
            self._between += _BETWEEN_RATE * (min(seconds, _LONGEST_BETWEEN) - self._between)

    def _text(self, request: str) -> tuple[int, NDArray[np.int32]]:
        """A request's row in the batch, its committed tokens and those assumed to follow."""
        batch = self._runner.input_batch
        row = batch.req_id_to_index[request]
        tokens: NDArray[np.int32] = batch.token_ids_cpu[row, : batch.num_tokens_no_spec[row]]
        _, path = self._assumed.get(request, (0, ()))
        return row, np.concatenate([tokens, np.asarray(path, np.int32)]) if path else tokens

    def _blocks(self, row: int) -> NDArray[np.int32]:
        table = self._model.table
        blocks: NDArray[np.int32] = table.get_numpy_array()[row, : table.num_blocks_per_row[row]]
        return blocks

    def _slots(self, row: int) -> int:
        return len(self._blocks(row)) * int(self._model.table.block_size)


def agreement(mine: Sequence[int], theirs: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    pairs = zip(mine, theirs, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(mine), len(theirs)))


def packed(spans: Sequence[tuple[int, int]], most: int) -> list[list[tuple[int, int, int]]]:
    """Cut spans of text into passes of at most `most` rows.

    Args:
        spans: (start, end) per text; may be empty.
        most: rows of a pass.

    Returns:
        Per pass its parts (index of the span, start, end); in a pass each span has one part at
        most, and the parts of a span are in order.
    """
    passes: list[list[tuple[int, int, int]]] = [[]]
    left = most
    for index, (start, end) in enumerate(spans):
        while start < end:
            if not left:
                passes.append([])
                left = most
            stop = min(end, start + left)
            passes[-1].append((index, start, stop))
            left -= stop - start
            start = stop
    return [parts for parts in passes if parts]


def _candidates(row: TopRow) -> Candidates:
    ids, probs = row
    pairs = zip(ids.tolist(), probs.tolist(), strict=True)
    return {t: min(p, 1.0) for t, p in pairs if p > _NEGLIGIBLE}
