# SPDX-License-Identifier: Apache-2.0
"""PEARL against a simulation that is written from the paper's rounds."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proposers.levels import LevelNode
from proposers.overlap import Overlap
from proposers.pearl import PROBE_EVERY, Pearl, Tally, likeliest, main_path
from proposers.source import Candidates
from proposers.tree import ROOT, TokenTree

VOCAB = 3


def target(text: Sequence[int]) -> int:
    """The target's next token: a fixed function of the text."""
    return (sum(3 * t + 1 for t in text[-4:]) + len(text) * len(text)) % VOCAB


class Draft:
    """Says what the target says, but for a share of contexts chosen by a hash."""

    def __init__(self, wrong: float, seed: int = 0) -> None:
        self.wrong, self.seed = wrong, seed

    def next(self, text: Sequence[int]) -> int:
        chance = random.Random(f"{self.seed}:{len(text)}:{list(text[-9:])}").random()
        return (target(text) + (chance < self.wrong)) % VOCAB

    def chain(self, text: Sequence[int], length: int) -> list[int]:
        grown = list(text)
        for _ in range(length):
            grown.append(self.next(grown))
        return grown[len(text) :]


class Model:
    """An `AssumingPredictor` over the texts of an engine."""

    def __init__(self, draft: Draft, texts: dict[str, list[int]]) -> None:
        self.draft, self.texts = draft, texts
        self.read = dict.fromkeys(texts, 0)
        self.assumed: dict[str, list[int]] = {}
        self.kept: dict[str, int] = {}
        self.nodes: dict[tuple[str, int], list[int]] = {}
        self.passes = 0
        self.slots = 99

    def assume(self, paths: Mapping[str, Sequence[int]]) -> None:
        self.assumed = {request: list(path) for request, path in paths.items()}

    def settle(self, kept: Mapping[str, int]) -> None:
        self.assumed = {}
        self.kept = dict(kept)

    def begin(self, requests: Sequence[str], *, trial: bool = False) -> dict[str, Candidates]:
        self.passes += 1
        self.nodes = {}
        for request in requests:
            text = self.texts[request] + self.assumed.get(request, [])
            self.nodes[request, ROOT] = text
            self.read[request] = len(text)
        return {request: self._found(self.nodes[request, ROOT]) for request in requests}

    def predict(self, nodes: Sequence[LevelNode]) -> list[Candidates]:
        self.passes += 1
        for node in nodes:
            before = self.nodes[node.request, node.parent]
            self.nodes[node.request, node.node] = [*before, node.token]
        return [self._found(self.nodes[node.request, node.node]) for node in nodes]

    def _found(self, text: Sequence[int]) -> Candidates:
        token = self.draft.next(text)
        return {token: 0.75, (token + 1) % VOCAB: 0.25}

    def debt(self, request: str) -> int:
        return max(0, len(self.texts[request]) - self.read[request])

    def room(self, request: str) -> int:
        used = sum(name == request for name, _ in self.nodes) - 1
        return self.slots - used

    def seconds(self, rows: int) -> float:
        return 1.0

    def slowdown(self) -> float:
        return 0.0


class Engine:
    """Steps of a target over texts, with chains from `Pearl`."""

    def __init__(
        self,
        draft: Draft,
        length: int,
        *,
        requests: Sequence[str] = ("a",),
        overlap: Overlap | None = None,
        inline: bool = False,
        stopped: Callable[[], bool] = lambda: False,
        limit: int = 99,
    ) -> None:
        self.texts: dict[str, list[int]] = {
            request: [i % VOCAB] for i, request in enumerate(requests)
        }
        self.model = Model(draft, self.texts)
        chosen = None if inline else overlap or Overlap()
        self.pearl = Pearl(self.model, most=length, overlap=chosen)
        self.stopped = stopped
        self.limit = limit
        self.trees = dict.fromkeys(requests, TokenTree.EMPTY)
        self.sizes: dict[str, list[int]] = {request: [] for request in requests}
        self.scheduled: list[int] = []
        self.beside: list[bool] = []
        self.pearl.begin(list(requests))  # the last step of the prompts
        self.model.passes = 0

    def step(self) -> None:
        planned = self.pearl.plan(self.trees, 1e9)
        self.beside.append(planned)
        if planned:
            self.pearl.draft(self.stopped)
        emitted = {}
        for request, tree in self.trees.items():
            emitted[request] = walk(self.texts[request], tree.tokens)
            self.scheduled.append(len(tree))
            self.sizes[request].append(len(emitted[request]))
        for request, tokens in emitted.items():
            self.texts[request] += tokens
        self.pearl.settle(emitted)
        self.trees = dict.fromkeys(self.texts, TokenTree.EMPTY)
        roots = self.pearl.begin(list(self.texts))
        for request, found in roots.items():
            self.trees[request] = self._chain(request, found)

    def _chain(self, request: str, found: Candidates) -> TokenTree:
        tokens: list[int] = []
        while found and len(tokens) < self.limit:
            tokens.append(likeliest(found))
            if self.pearl.room(request) <= 0:
                break
            at = len(tokens) - 1
            node = LevelNode(request, at, at - 1 if at else ROOT, tokens[-1])
            (found,) = self.pearl.predict([node])
        return TokenTree.chain(tokens, [0.9 ** (i + 1) for i in range(len(tokens))])


def walk(text: Sequence[int], scheduled: Sequence[int]) -> list[int]:
    grown = list(text)
    for token in scheduled:
        own = target(grown)
        grown.append(own)
        if own != token:
            return grown[len(text) :]
    grown.append(target(grown))
    return grown[len(text) :]


def reference(draft: Draft, length: int, rounds: int) -> list[int]:
    """Tokens of each round, from the paper's two phases and without a predictor.

    One uninterrupted draft runs ahead of the text; a round verifies what the draft had made when it
    began, plus one token of the target's own.
    """
    text, ahead, sizes = [0], 0, []
    for _ in range(rounds):
        made = draft.chain(text, ahead + length)
        size = 0
        for token in made[: ahead + 1]:
            own = target(text)
            text.append(own)
            size += 1
            if own != token:
                ahead = 0
                break
        else:  # all right, and so was the guess of the target's own token
            ahead = len(made) - (ahead + 1)
        sizes.append(size)
    return sizes


@given(st.integers(2, 7), st.sampled_from([0.0, 0.05, 0.2, 0.5, 1.0]), st.integers(0, 99))
def test_rounds_are_those_of_the_paper(length: int, wrong: float, seed: int) -> None:
    draft, rounds = Draft(wrong, seed), 25
    engine = Engine(draft, length)
    for _ in range(rounds):
        engine.step()
    assert engine.sizes["a"] == reference(draft, length, rounds)
    expected = [0]
    while len(expected) < len(engine.texts["a"]):
        expected.append(target(expected))
    assert engine.texts["a"] == expected


class _Credulous(Pearl):
    """Takes every proposal for confirmed."""

    def settle(self, emitted: Mapping[str, Sequence[int]]) -> None:
        ahead = dict(self._ahead)
        super().settle(emitted)
        self._settled.update(ahead)


def test_a_proposal_for_another_text_would_show() -> None:
    draft = Draft(0.3)
    engine = Engine(draft, 4)
    engine.pearl = _Credulous(engine.model, most=4, overlap=Overlap())
    engine.pearl.begin(["a"])
    for _ in range(40):
        engine.step()
    assert engine.sizes["a"] != reference(draft, 4, 40)


def test_a_draft_that_is_always_right_never_leaves_post_verification() -> None:
    engine = Engine(Draft(0.0), 4)
    for _ in range(50):
        engine.step()
    # The first round verifies c_0 alone; each later one g - 1 tokens, and adds one of its own.
    assert engine.sizes["a"] == [1] + [4] * 49
    assert engine.pearl.tally == Tally(steps=50, passes=200, requests=50, hits=50)
    assert engine.model.passes == 200  # none was waited for


def test_a_draft_that_is_always_wrong_costs_no_verification() -> None:
    engine = Engine(Draft(1.0), 4)
    for _ in range(30):
        engine.step()
    assert sum(engine.scheduled) == 0
    assert engine.pearl.tally.hits == 0


def test_requests_of_a_batch_do_not_disturb_each_other() -> None:
    names = ("a", "b", "c")
    together = Engine(Draft(0.3, seed=5), 4, requests=names)
    for _ in range(40):
        together.step()
    for i, name in enumerate(names):
        alone = Engine(Draft(0.3, seed=5), 4, requests=[name])
        alone.texts[name][:] = [i]
        for _ in range(40):
            alone.step()
        assert alone.sizes[name] == together.sizes[name]


def test_once_the_target_has_ended_no_pass_is_begun() -> None:
    engine = Engine(Draft(0.0), 9, stopped=lambda: True)
    for _ in range(20):
        engine.step()
    # Two passes are always made: one alone would only guess the target's own token.
    assert engine.pearl.tally.passes == 40
    assert engine.sizes["a"] == [1] + [2] * 19


def test_where_no_slots_are_left_the_draft_ends() -> None:
    engine = Engine(Draft(0.0), 9)
    engine.model.slots = 3
    for _ in range(10):
        engine.step()
    assert engine.sizes["a"] == [1] + [4] * 9


def test_the_engine_may_verify_less_than_was_drafted() -> None:
    engine = Engine(Draft(0.0), 6, limit=2)
    for _ in range(10):
        engine.step()
    assert engine.sizes["a"] == [1] + [3] * 9
    # The path that the model went on from is the one that was verified.
    assert engine.model.kept == {"a": 2}


def test_a_request_that_lost_its_blocks_is_drafted_in_line() -> None:
    engine = Engine(Draft(0.0), 4, requests=("a", "b"))
    for _ in range(5):
        engine.step()
    passes = engine.model.passes
    engine.pearl.plan(engine.trees, 1e9)
    engine.pearl.draft(lambda: False)
    engine.pearl.forget("a")
    engine.pearl.settle({"b": walk(engine.texts["b"], engine.trees["b"].tokens)})
    assert engine.pearl.seconds(1) == 0.0  # the other one waits for nothing
    found = engine.pearl.begin(["a", "b"])
    assert set(found) == {"a", "b"}
    assert engine.model.passes == passes + 4 + 1
    assert engine.pearl.seconds(1) == 1.0  # a pass is waited for


def test_a_request_far_behind_is_read_in_line() -> None:
    engine = Engine(Draft(1.0), 4)
    engine.step()
    assert engine.pearl.begin(["a"]) == {}
    engine.texts["a"] += [0] * 40
    assert engine.pearl.debt("a") > 40
    assert set(engine.pearl.begin(["a"])) == {"a"}


def test_requests_that_want_no_draft_are_left_alone() -> None:
    engine = Engine(Draft(0.0), 4)
    engine.step()
    engine.pearl.settle({})
    engine.pearl.begin([])
    assert not engine.pearl.plan(engine.trees, 1e9)
    engine.pearl.settle({})
    assert engine.pearl.seconds(1) == 1.0  # nothing was drafted beside the step
    engine.pearl.begin(["a"])
    assert not engine.pearl.plan({"other": TokenTree.EMPTY}, 1e9)


def test_in_line_it_is_the_model_itself() -> None:
    engine = Engine(Draft(0.0), 4, inline=True, limit=4)
    engine.model.slots = 3
    for _ in range(10):
        engine.step()
    assert engine.sizes["a"] == [5] * 10 or engine.sizes["a"] == [1] + [5] * 9
    assert not any(engine.beside)
    assert engine.pearl.tally == Tally()
    assert engine.pearl.seconds(1) == 1.0


def test_without_overlap_it_goes_in_line_and_tries_again() -> None:
    overlap = Overlap()
    engine = Engine(Draft(0.0), 4, overlap=overlap)
    engine.model.slots = 3
    for _ in range(50):
        overlap.record(2.0, 1.0, 1.0)
    for _ in range(600):
        engine.step()
        if engine.beside[-1]:
            overlap.record(2.0, 1.0, 1.0)
    assert 1 <= sum(engine.beside) <= 3
    assert min(engine.sizes["a"][1:]) > 1  # in line it drafts as well


@pytest.mark.parametrize(("wrong", "beside"), [(0.0, True), (0.5, False)])
def test_where_too_little_is_right_it_goes_in_line(wrong: float, beside: bool) -> None:
    """Perfectly hidden, but a step whose neighbour was wrong verifies nothing."""
    overlap = Overlap()
    engine = Engine(Draft(wrong), 4, overlap=overlap, limit=2)
    for _ in range(400):
        engine.step()
        if engine.beside[-1]:
            overlap.record(1.0, 1.0, 0.1)
    late = engine.beside[200:]
    assert sum(late) > 190 if beside else sum(late) < 10
    assert overlap.hidden > 0.99
    assert (overlap.hits > 0.9) is beside
    # Of two drafted tokens both are right, or three quarters of one.
    assert overlap.accepted == pytest.approx(2.0 if beside else 0.75, abs=0.3)
    sizes = engine.sizes["a"][200:]
    assert sum(sizes) / len(sizes) > (2.5 if beside else 1.3)


def test_what_a_step_loses_to_drafting_beside_it_is_told() -> None:
    overlap = Overlap()
    engine = Engine(Draft(0.0), 4, overlap=overlap)
    assert engine.pearl.slowdown() == 0.0
    for _ in range(60):
        overlap.record(1.2, 1.0, 0.9)
    assert engine.pearl.slowdown() == pytest.approx(0.2, rel=0.01)
    for _ in range(60):
        overlap.record(1.9, 1.0, 0.9)
    assert not overlap.beside
    assert engine.pearl.slowdown() == 0.0  # in line nothing is lost


def test_now_and_then_the_target_runs_alone() -> None:
    engine = Engine(Draft(0.0), 4)
    for _ in range(3 * (PROBE_EVERY + 1)):
        engine.step()
    assert engine.beside.count(False) == 3
    assert engine.beside[PROBE_EVERY] is False


def test_a_step_too_short_for_two_passes_is_not_waited_for() -> None:
    engine = Engine(Draft(0.0), 4)
    engine.step()
    slow = 2.0 * engine.pearl._pass_seconds
    assert engine.pearl.plan(engine.trees, 1.01 * slow)
    engine.pearl.draft(lambda: False)
    engine.pearl._pass_seconds = slow  # the machine became slower
    tries = 0
    while not engine.pearl.plan(engine.trees, 1.5 * slow):
        engine.pearl.settle({})
        assert set(engine.pearl.begin(["a"])) == {"a"}  # in line
        tries += 1
    assert 20 < tries < 40  # and then the passes are timed again


def test_only_the_drafted_chain_is_answered() -> None:
    engine = Engine(Draft(0.0), 5)
    engine.pearl.plan(engine.trees, 1e9)
    engine.pearl.draft(lambda: False)
    own = target(engine.texts["a"])
    engine.texts["a"].append(own)
    engine.pearl.settle({"a": [own]})
    root = engine.pearl.begin(["a"])["a"]
    right = likeliest(root)
    wrong = next(token for token in root if token != right)
    sibling, child = (LevelNode("a", node, ROOT, t) for node, t in ((7, wrong), (8, right)))
    below = LevelNode("a", 9, 7, 0)
    answers = engine.pearl.predict([sibling, child, below])
    assert [bool(found) for found in answers] == [False, True, False]


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        (TokenTree.EMPTY, ()),
        (TokenTree.chain([5, 6, 7], [0.5, 0.4, 0.3]), (5, 6, 7)),
        (TokenTree((5, 6, 7, 8), (ROOT, ROOT, 1, 0), (0.3, 0.5, 0.4, 0.2)), (6, 7)),
        (TokenTree((5, 6), (ROOT, ROOT), (0.5, 0.5)), (5,)),
    ],
)
def test_the_likeliest_path(tree: TokenTree, path: tuple[int, ...]) -> None:
    assert main_path(tree) == path


def test_the_likeliest_candidate_is_the_smaller_of_equals() -> None:
    assert likeliest({4: 0.2, 9: 0.4, 3: 0.4}) == 3
