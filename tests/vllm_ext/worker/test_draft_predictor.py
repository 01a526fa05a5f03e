# SPDX-License-Identifier: Apache-2.0
"""What the draft model reads, against a model that remembers what lies in every slot.

A simulated engine commits tokens, shares and reuses blocks, cuts prompts into chunks and preempts;
in some steps nothing is drafted. Whatever happens, every answer must be that for the request's true
text. The mutations at the end show that the simulation would notice.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proposers import CostModel
from proposers.levels import LevelNode
from proposers.tree import ROOT
from vllm_ext.worker import draft_predictor
from vllm_ext.worker.draft_ledger import DraftLedger
from vllm_ext.worker.draft_model import DraftRows
from vllm_ext.worker.draft_predictor import DraftPredictor, agreement, packed

BLOCK, POOL, LONGEST, VOCAB = 4, 24, 60, 3


def answer(text: tuple[int, ...]) -> int:
    return hash(text) % 1_000_003


class Table:
    """vLLM's block table of one KV group."""

    block_size = BLOCK

    def __init__(self) -> None:
        self.rows = np.zeros((8, 32), np.int32)
        self.num_blocks_per_row = np.zeros(8, np.int32)

    def get_numpy_array(self) -> Any:
        return self.rows


class RememberingModel:
    """Keeps, in every slot, the text that its key and value were computed from."""

    max_model_len = LONGEST
    vocab_size = VOCAB

    def __init__(self, table: Table, partial: bool, branching: bool) -> None:
        self.table = table
        self.slots: dict[int, tuple[int, ...]] = {}
        self.seconds = 0.0
        self.target_runs = False
        self.rows = 0
        self.partial, self.branching = partial, branching

    def run(
        self, parts: Sequence[DraftRows], width: int, *, beside: bool = False
    ) -> tuple[Any, Any]:
        assert beside is self.target_runs
        assert len({part.row for part in parts}) == len(parts)
        answers: list[int] = []
        # All rows of a pass are written before any row attends, layer by layer; so in order of
        # position each may see the others.
        for part in parts:
            assert part.tokens
            if part.tree is not None:
                assert self.branching
                assert part.first == 0 or self.partial
            texts = [self._row(part, i) for i in range(len(part.tokens))]
            self.rows += len(texts)
            answers.extend(answer(t) for t in texts[len(texts) - part.wanted :])
        ids = np.array(answers, np.int64)[:, None]
        return ids, np.full(ids.shape, 0.9, np.float32)

    def _row(self, part: DraftRows, i: int) -> tuple[int, ...]:
        token, at = int(part.tokens[i]), part.start + i
        if part.tree is None:
            before = range(at)
        else:
            base = part.start - part.first
            node = at - base - 1
            path = []
            while node >= 0 and (node := part.tree.parents[node]) >= 0:
                path.append(base + 1 + node)
            before = [*range(base + (at > base)), *reversed(path)]  # type: ignore[assignment]
            if at > base:
                assert part.tree.tokens[at - base - 1] == token
        text: tuple[int, ...] = ()
        for slot in before:
            seen = self.slots.get(self._slot(part.row, slot), (-2,))
            text = seen if seen[:-1] == text else (-1,)  # (-1,): keys of different texts
        text = (*text, token)
        self.slots[self._slot(part.row, at)] = text
        return text

    def _slot(self, row: int, at: int) -> int:
        assert at < self.table.num_blocks_per_row[row] * BLOCK, "beyond the allocated blocks"
        return int(self.table.rows[row, at // BLOCK]) * BLOCK + at % BLOCK


class Engine:
    """Requests over a pool of blocks, with a prefix cache that knows the target's blocks only."""

    def __init__(
        self, seed: int, *, partial: bool = True, branching: bool = True, beside: bool = False
    ) -> None:
        self.beside = beside
        self.random = random.Random(seed)
        self.table = Table()
        self.model = RememberingModel(self.table, partial, branching)
        self.batch = SimpleNamespace(
            req_id_to_index={},
            token_ids_cpu=np.zeros((8, 128), np.int32),
            num_tokens_no_spec=np.zeros(8, np.int32),
        )
        runner = SimpleNamespace(
            input_batch=self.batch, requests={}, max_num_tokens=9, max_model_len=LONGEST
        )
        self.runner = runner
        cost = CostModel([(1, 1.0)])
        self.predictor = DraftPredictor(
            self.model,  # type: ignore[arg-type]
            runner,
            branching=branching,
            partial=partial,
            cost=cost,
        )
        self.free = list(range(1, POOL))
        self.cached: dict[tuple[int, ...], int] = {}  # text up to a full block's end
        self.users = dict.fromkeys(range(POOL), 0)
        self.texts: dict[str, list[int]] = {}
        self.count = 0
        self.answers = self.wrong = 0

    def token(self) -> int:
        return self.random.randrange(VOCAB)

    def admit(self, name: str, text: list[int]) -> bool:
        """Give a request blocks: cached ones for its prefix, then fresh ones."""
        hits = []
        while (end := (len(hits) + 1) * BLOCK) < len(text) and tuple(text[:end]) in self.cached:
            hits.append(self.cached[tuple(text[:end])])
        row = next((r for r in range(8) if r not in self.batch.req_id_to_index.values()), None)
        if row is None:
            return False
        self.batch.req_id_to_index[name] = row
        self.table.num_blocks_per_row[row] = 0
        for block in hits:
            self._append(row, block)
        self.batch.token_ids_cpu[row, : len(text)] = text
        self.batch.num_tokens_no_spec[row] = len(text)
        self.runner.requests[name] = SimpleNamespace(prompt_token_ids=text, mm_features=[])
        self.texts[name] = text
        if not self.grow(name):
            self.release(name)
            return False
        return True

    def grow(self, name: str) -> bool:
        """Blocks for the text and a few drafts."""
        row = self.batch.req_id_to_index[name]
        while self.table.num_blocks_per_row[row] * BLOCK < len(self.texts[name]) + 5:
            unused = [b for b in self.free if self.users[b] == 0]
            if not unused:
                return False
            block = self.random.choice(unused)
            for text in [t for t, b in self.cached.items() if b == block]:
                del self.cached[text]  # evicted
            self._append(row, block)
        return True

    def commit(self, name: str, tokens: list[int]) -> None:
        row, text = self.batch.req_id_to_index[name], self.texts[name]
        text.extend(tokens)
        self.batch.token_ids_cpu[row, : len(text)] = text
        self.batch.num_tokens_no_spec[row] = len(text)
        for end in range(BLOCK, len(text), BLOCK):
            block = int(self.table.rows[row, end // BLOCK - 1])
            self.cached.setdefault(tuple(text[:end]), block)

    def release(self, name: str) -> list[int]:
        """Finish or preempt a request; its blocks may be reused while they stay cached."""
        row = self.batch.req_id_to_index.pop(name)
        for block in self.table.rows[row, : self.table.num_blocks_per_row[row]].tolist():
            self.users[block] -= 1
        self.table.num_blocks_per_row[row] = 0
        self.predictor.forget(name)
        return self.texts.pop(name)

    def _append(self, row: int, block: int) -> None:
        self.table.rows[row, self.table.num_blocks_per_row[row]] = block
        self.table.num_blocks_per_row[row] += 1
        self.users[block] += 1

    def draft(self, names: list[str], levels: int) -> dict[str, list[tuple[int, int]]]:
        """Ask the predictor, level by level; returns the nodes (parent, token) of each request."""
        roots = self.predictor.begin(names)
        nodes: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
        for name, found in roots.items():
            self._check(found, tuple(self.texts[name]))
        for _ in range(levels):
            asked: list[LevelNode] = []
            for name in roots:
                room = self.predictor.room(name)
                for _ in range(self.random.randint(0, 3)):
                    if room <= 0:
                        break
                    made = nodes[name]
                    parent = self.random.randint(-1, len(made) - 1)
                    if not self.model.branching:
                        parent = len(made) - 1
                    token = self.token()
                    if (parent, token) in made:
                        continue
                    asked.append(LevelNode(name, len(made), parent, token))
                    made.append((parent, token))
                    room -= 1
            if asked:
                for node, found in zip(asked, self.predictor.predict(asked), strict=True):
                    text = tuple(self.texts[node.request]) + self.path(
                        nodes[node.request], node.node
                    )
                    self._check(found, text)
        return nodes

    def _scheduled(self, nodes: list[tuple[int, int]]) -> tuple[int, ...]:
        """What a step verifies: drafts of this predictor, or of another source."""
        dice = self.random
        if nodes and dice.random() < 0.7:
            return self.path(nodes, dice.randrange(len(nodes)))
        return tuple(self.token() for _ in range(dice.randint(0, 2)))

    def draft_beside(self, paths: dict[str, tuple[int, ...]], levels: int) -> dict[str, list[int]]:
        """Continue behind what a step verifies; returns the chain of each request."""
        self.predictor.assume(paths)
        self.model.target_runs = True
        chains: dict[str, list[int]] = {}
        for name, found in self.predictor.begin(list(paths)).items():
            self._check(found, (*self.texts[name], *paths[name]))
            chains[name] = []
        for level in range(levels):
            asked = [
                LevelNode(name, level, level - 1, self.token())
                for name, chain in chains.items()
                if len(chain) == level and self.predictor.room(name) > 0
            ]
            if asked:
                for node, found in zip(asked, self.predictor.predict(asked), strict=True):
                    chain = chains[node.request]
                    chain.append(node.token)
                    self._check(found, (*self.texts[node.request], *paths[node.request], *chain))
        self.model.target_runs = False
        return chains

    def path(self, nodes: list[tuple[int, int]], node: int) -> tuple[int, ...]:
        tokens: tuple[int, ...] = ()
        while node != ROOT:
            node, token = nodes[node]
            tokens = (token, *tokens)
        return tokens

    def _check(self, found: dict[int, float], text: tuple[int, ...]) -> None:
        self.answers += 1
        self.wrong += list(found) != [answer(text)]

    def step(self) -> None:
        """One engine step with whatever may happen in it."""
        dice = self.random
        if len(self.texts) < 3 and dice.random() < 0.4:
            self.count += 1
            shared = [1, 2, 0, 2, 1, 1, 0, 0, 2, 1, 0, 1, 2][: dice.randint(0, 13)]
            self.admit(f"r{self.count}", shared + [self.token() for _ in range(dice.randint(1, 9))])
        for name in list(self.texts):
            if len(self.texts[name]) > LONGEST - 8 or dice.random() < 0.05:
                self.release(name)
            elif dice.random() < 0.07:  # preempted, and resumed at once or later under its name
                text = self.release(name)
                if dice.random() < 0.7:
                    self.admit(name, text)
        names = [name for name in self.texts if dice.random() < 0.8]
        nodes: dict[str, list[tuple[int, int]]] = {}
        waiting = [name for name in self.texts if name not in names]
        self.predictor.prompts = {
            name: dice.randint(1, len(self.texts[name])) for name in waiting if dice.random() < 0.3
        }
        if names and dice.random() < 0.7:
            nodes = self.draft(names, dice.randint(0, 3))
        paths: dict[str, tuple[int, ...]] = {}
        chains: dict[str, list[int]] = {}
        if names and self.beside and dice.random() < 0.7:
            paths = {name: self._scheduled(nodes.get(name, [])) for name in names}
            chains = self.draft_beside(paths, dice.randint(0, 3))
        kept = {}
        for name in names:
            emitted: list[int] = []
            drafted = nodes.get(name, [])
            if name in paths and dice.random() < 0.7:
                emitted = [*paths[name], *chains.get(name, ())]
                emitted = emitted[: dice.randint(0, len(emitted))]
            elif drafted and dice.random() < 0.7:
                emitted = list(self.path(drafted, dice.randrange(len(drafted))))
            emitted.append(self.token())
            self.commit(name, emitted)
            if name in paths:
                kept[name] = draft_predictor.agreement(paths[name], emitted)
        if paths:
            self.predictor.settle(kept)
        for name in names:
            if not self.grow(name):
                self.release(name)


MODES = [
    {},
    {"partial": False},
    {"branching": False},
    {"beside": True},
]


def played(steps: int = 80, seeds: int = 3, **mode: bool) -> tuple[int, int]:
    """Answers given, and wrong ones."""
    answers = wrong = 0
    for seed in range(seeds):
        engine = Engine(seed, **mode)
        for _ in range(steps):
            engine.step()
        answers += engine.answers
        wrong += engine.wrong
    return answers, wrong


@pytest.mark.parametrize("mode", MODES, ids=["partial", "whole", "chains", "beside"])
def test_every_answer_is_for_the_true_text(mode: dict[str, bool]) -> None:
    answers, wrong = played(**mode)
    assert answers > 300
    assert wrong == 0


def test_blind_trust_in_cached_blocks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DraftLedger, "valid", lambda self, tokens, blocks: len(tokens) - 1)
    assert played()[1] > 0


def test_marks_that_outlive_a_reused_block_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> int:
        engine = Engine(0)
        engine.free = [1, 2, 3, 4]
        engine.random.choice = min  # type: ignore[assignment]
        text = [0, 1, 2, 0, 1]
        for name, tokens in (("a", text), ("b", [2, 2]), ("c", text)):  # in the same blocks
            assert engine.admit(name, list(tokens))
            engine.draft([name], 0)
            engine.release(name)
        return engine.wrong

    assert wrong() == 0
    monkeypatch.setattr(DraftLedger, "scribbled", lambda self, blocks, start, end: None)
    assert wrong() > 0


def test_a_skipped_catch_up_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        draft_predictor, "packed", lambda spans, most: packed([(e - 1, e) for _, e in spans], most)
    )
    assert played()[1] > 0


def test_drafts_taken_for_accepted_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        draft_predictor, "agreement", lambda mine, theirs: min(len(mine), len(theirs))
    )
    assert played()[1] > 0


def test_assumed_tokens_taken_for_accepted_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    settle = DraftPredictor.settle

    def trusting(self: DraftPredictor, kept: dict[str, int]) -> None:
        settle(self, dict.fromkeys(kept, 99))

    monkeypatch.setattr(DraftPredictor, "settle", trusting)
    assert played(beside=True)[1] > 0


def test_a_request_that_lost_its_blocks_unnoticed_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(DraftPredictor, "forget", lambda self, request: None)
    assert played()[1] > 0


def test_accepted_chains_are_not_read_again() -> None:
    engine = Engine(0)
    engine.admit("a", [0, 1, 2, 0, 1])
    engine.draft(["a"], 0)
    before = engine.model.rows
    for node, token in enumerate([2, 2]):
        engine.predictor.predict([LevelNode("a", node, node - 1, token)])
    engine.commit("a", [2, 2, 1])
    assert engine.model.rows == before + 2
    assert engine.predictor.debt("a") == 3
    engine.draft(["a"], 0)
    assert engine.model.rows == before + 3  # the walk's own token only
    assert engine.wrong == 0


@pytest.mark.parametrize(
    "break_it",
    [
        lambda engine, state: setattr(state, "prompt_token_ids", None),
        lambda engine, state: setattr(state, "mm_features", ["image"]),
        lambda engine, state: setattr(engine.model, "vocab_size", 2),
        lambda engine, state: engine.predictor.__dict__.update(_longest=4),
        lambda engine, state: engine.table.num_blocks_per_row.fill(1),
    ],
    ids=["embeddings", "image", "vocabulary", "length", "blocks"],
)
def test_what_it_cannot_read_is_left_out(break_it: Any) -> None:
    engine = Engine(0)
    engine.admit("a", [0, 1, 2, 0, 1])
    assert set(engine.predictor.begin(["a"])) == {"a"}
    engine.predictor.forget("a")
    break_it(engine, engine.runner.requests["a"])
    assert engine.predictor.begin(["a"]) == {}


spans = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=6).map(
    lambda found: [(start, start + length) for start, length in found]
)


@given(spans, st.integers(1, 12))
def test_packing_covers_every_span_once_and_in_order(
    found: list[tuple[int, int]], most: int
) -> None:
    passes = packed(found, most)
    for parts in passes:
        assert 0 < sum(end - start for _, start, end in parts) <= most
        assert len({index for index, _, _ in parts}) == len(parts)
    for index, (start, end) in enumerate(found):
        pieces = [(a, b) for parts in passes for i, a, b in parts if i == index]
        assert [at for a, b in pieces for at in range(a, b)] == list(range(start, end))
    assert len(passes) == -(-sum(end - start for start, end in found) // most)


def test_agreement() -> None:
    assert agreement([1, 2, 3], [1, 2, 4]) == 2
    assert agreement([1], [1, 2]) == 1
    assert agreement([], [1]) == 0
