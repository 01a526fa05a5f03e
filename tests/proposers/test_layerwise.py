# SPDX-License-Identifier: Apache-2.0
"""Level-by-level growth: the same trees as best-first growth, in few passes, while they pay."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proposers import Candidates, CostModel, DySpecOptions, Mixture, TokenTree
from proposers.dyspec import DySpec
from proposers.grower import Draftee
from proposers.layerwise import Layerwise
from proposers.levels import LevelNode, ModelSource
from proposers.rasd import Rasd
from proposers.tree import ROOT

FREE = CostModel([(1, 1.0)], margin=0.0)
PROMPTS = CostModel([(1, 0.030), (1001, 0.8)])
STEEP = CostModel([(1, 0.030), (8, 0.034), (64, 0.090)])


def law(text: tuple[object, ...], flatness: float = 0.3) -> Candidates:
    """A random distribution over five tokens that depends on the text alone."""
    seed = int.from_bytes(hashlib.blake2b(repr(text).encode(), digest_size=4).digest(), "little")
    probs = np.random.default_rng(seed).dirichlet([flatness] * 5)
    return {token: float(p) for token, p in enumerate(probs) if p > 1e-9}


class Model:
    """A `LevelPredictor` with the law above; it checks how it is asked."""

    def __init__(self, seconds: float = 0.0, room: int = 1000, deaf: tuple[str, ...] = ()) -> None:
        self.pass_seconds = seconds
        self.rooms = room
        self.deaf = deaf
        self.passes: list[int] = []
        self.begun = 0
        self.flatness = 0.3
        self.slower = 0.0
        self.debts: dict[str, int] = {}
        self.asked: list[tuple[list[str], bool]] = []
        self._texts: dict[str, dict[int, tuple[object, ...]]] = {}

    def begin(self, requests: Sequence[str], *, trial: bool = False) -> dict[str, Candidates]:
        self.begun += 1
        self.asked.append((list(requests), trial))
        self.passes = []
        self._texts = {r: {ROOT: (r,)} for r in requests if r not in self.deaf}
        return {r: law(texts[ROOT], self.flatness) for r, texts in self._texts.items()}

    def debt(self, request: str) -> int:
        return self.debts.get(request, 1)

    def room(self, request: str) -> int:
        return self.rooms - len(self._texts[request]) + 1

    def predict(self, nodes: Sequence[LevelNode]) -> list[Candidates]:
        assert nodes
        self.passes.append(len(nodes))
        answers = []
        for node in nodes:
            texts = self._texts[node.request]
            assert node.node not in texts, "asked twice"
            assert len(texts) <= self.rooms, "no room"
            texts[node.node] = (*texts[node.parent], node.token)
            answers.append(law(texts[node.node], self.flatness))
        return answers

    def seconds(self, rows: int) -> float:
        return self.pass_seconds * (1 + 0.02 * rows)

    def slowdown(self) -> float:
        return self.slower


class Oracle(ModelSource):
    """The same law, asked node by node."""

    def root(self, request: str) -> tuple[object, ...]:
        return (request,)

    def advance(self, state: tuple[object, ...], token: int) -> tuple[object, ...]:
        return (*state, token)

    def candidates(self, state: tuple[object, ...]) -> tuple[int, Candidates]:
        asked = ModelSource()
        looked = asked.root("")
        asked.tell(looked, law(state))
        return asked.candidates(looked)


def draftee(request: str, limit: int = 12, *, chain: bool = False) -> Draftee:
    return Draftee(request, greedy=True, chain=chain, limit=limit)


def grow(grower: Layerwise | DySpec, *draftees: Draftee, cost: CostModel = FREE) -> list[TokenTree]:
    count = len(draftees)
    trees = grower.grow(draftees, cost, base_rows=count, base_tokens=float(count))
    for tree, one in zip(trees, draftees, strict=True):
        tree.validate()
        assert len(tree) <= one.limit
        assert tree.is_chain or not one.chain
    return trees


def asked_often(model: Model, request: str) -> Layerwise:
    """A grower whose gate has made up its mind about the model."""
    grower = Layerwise(model, [], options())
    for _ in range(60):
        grow(grower, draftee(request), cost=STEEP)
    return grower


def with_closed_gate(request: str) -> tuple[Model, Layerwise]:
    """A model that did not pay, and a grower that has noticed."""
    model = Model(0.03)
    model.flatness = 5.0
    grower = asked_often(model, request)
    assert grower.gate is not None
    assert not grower.gate.is_open
    return model, grower


def options(**more: float) -> DySpecOptions:
    made = {"max_nodes": 64, "max_batch_nodes": 500, "min_prob": 0.01, "max_depth": 8, **more}
    return DySpecOptions(**made)  # type: ignore[arg-type]


names = st.lists(st.text("abcdef", min_size=1, max_size=6), min_size=1, max_size=4, unique=True)


@settings(max_examples=60, deadline=None)
@given(names, st.booleans(), st.sampled_from([0.01, 0.05, 0.2]))
def test_with_enough_nodes_it_grows_what_best_first_growth_does(
    requests: list[str], chain: bool, threshold: float
) -> None:
    limits = options(min_prob=threshold)
    draftees = [draftee(name, 64, chain=chain) for name in requests]
    levels = grow(Layerwise(Model(), [], limits, free=True), *draftees)
    singly = grow(DySpec(Mixture([Oracle()]), limits), *draftees)
    assert levels == singly


def test_a_tree_costs_as_many_passes_as_it_is_deep() -> None:
    model = Model()
    (tree,) = grow(Layerwise(model, [], options(), free=True), draftee("a", 64))
    assert len(tree) > 2 * max(tree.depths)
    # One pass for each level that has children; leaves below the threshold may take one more.
    assert len(model.passes) <= max(tree.depths) + 1


def test_a_path_that_other_sources_propose_is_scored_in_one_pass(table_source) -> None:
    follow = table_source({i: {i + 1: 0.99} for i in range(10, 16)})
    follow.start("a", [10], greedy=True)
    model = Model()
    grow(Layerwise(model, [follow], options(max_depth=5), free=True), draftee("a", 64))
    assert model.passes[0] >= 4


@pytest.mark.parametrize("free", [True, False])
@given(names, st.integers(0, 9), st.integers(0, 6))
@settings(max_examples=30, deadline=None)
def test_limits_and_room_are_kept(free: bool, requests: list[str], limit: int, room: int) -> None:
    grower = Layerwise(Model(0.001, room), [], options(), free=free)
    for _ in range(3):
        grow(grower, *(draftee(r, limit) for r in requests), cost=FREE if free else STEEP)


@pytest.mark.parametrize("free", [True, False])
def test_a_step_with_little_room_has_few_nodes(free: bool) -> None:
    for most in (0, 1, 4):
        grower = Layerwise(Model(1e-6), [], options(), free=free)
        trees = grower.grow(
            [draftee("a"), draftee("b")], FREE, base_rows=2, base_tokens=2.0, most=most
        )
        assert sum(map(len, trees)) == most


def test_a_request_that_the_model_cannot_read_is_left_to_the_others(table_source) -> None:
    follow = table_source({i: {i + 1: 0.9} for i in range(10, 16)})
    for name in ("a", "b"):
        follow.start(name, [10], greedy=True)
    grower = Layerwise(Model(deaf=("b",)), [follow], options(), free=True)
    one, other = grow(grower, draftee("a"), draftee("b"))
    assert other.tokens[0] == 11
    assert set(one.tokens) - set(range(10, 20))


def test_passes_end_when_they_do_not_pay() -> None:
    counts = []
    for seconds in (1e-6, 0.004, 0.02, 10.0):
        model = Model(seconds)
        model.flatness = 0.05  # confident
        grower = Layerwise(model, [], options())
        grow(grower, draftee("a"), cost=STEEP)
        counts.append(len(model.passes))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[1] > counts[-1] == 0


def test_a_model_that_never_pays_is_asked_rarely_and_one_that_pays_always() -> None:
    asked = {}
    for seconds in (0.0002, 10.0):
        model = Model(seconds)
        model.flatness = 0.05
        grower = Layerwise(model, [], options())
        for _ in range(400):
            grow(grower, draftee("a"), cost=STEEP)
        asked[seconds] = model.begun
    assert asked[0.0002] == 400
    assert asked[10.0] < 60  # some tens until the gate closes, then ever more rarely


def test_a_trial_reads_little_and_speaks_for_all() -> None:
    """A closed gate asks about the requests with least to read, and opens when the model pays."""
    model = Model(10.0)  # seconds: never pays
    grower = Layerwise(model, [], options(max_batch_nodes=32))
    draftees = [draftee(name) for name in "abcd"]
    for step in range(250):
        grow(grower, *draftees, cost=STEEP)
        if step == 40:
            model.debts = {name: 30 + 100 * (name > "b") for name in "abcd"}
            model.pass_seconds = 0.01  # so that a trial can be paid
    assert grower.gate is not None
    assert not grower.gate.is_open
    assert model.asked[0] == (list("abcd"), False)
    trials = [asked for asked, trial in model.asked if trial]
    assert trials[-1] in (["a"], ["a", "b"])
    model.pass_seconds, model.flatness = 1e-6, 0.05  # from now on it does
    for _ in range(600):
        grow(grower, *draftees, cost=STEEP)
    assert grower.gate.is_open
    assert model.asked[-1] == (list("abcd"), False)


def test_batches_of_another_size_have_a_gate_of_their_own() -> None:
    """What opens the gate for one request does not make many read their prompts."""
    model = Model()
    model.flatness = 0.05
    grower = Layerwise(model, [], options(max_batch_nodes=32))
    many = [draftee(name) for name in "abcdefgh"]
    for _ in range(20):  # with many requests it never pays
        model.pass_seconds = 10.0
        grow(grower, *many, cost=STEEP)
    for _ in range(20):  # with one it does
        model.pass_seconds = 1e-6
        grow(grower, draftee("a"), cost=STEEP)
    assert grower.gate is not None
    assert grower.gate.is_open
    model.asked = []
    model.pass_seconds = 10.0
    for _ in range(5):
        grow(grower, *many, cost=STEEP)
    assert model.asked == []


def test_a_long_text_is_read_where_that_is_earned_back() -> None:
    """An open gate asks about a request with much to read as soon as its gain pays for that."""
    model = Model(0.0005)
    model.flatness = 0.05
    grower = Layerwise(model, [], options())
    model.debts = {"a": 20_000}  # 0.2 seconds
    grow(grower, draftee("a"), draftee("b"), cost=STEEP)
    assert model.asked == [(["b"], True)]
    for _ in range(60):
        grow(grower, draftee("a"), draftee("b"), cost=STEEP)
    assert model.asked[-1] == (["a", "b"], False)
    assert grower.gate is not None
    assert grower.gate.gain > 0.1


def test_trials_take_a_small_share_of_the_time() -> None:
    """One that has to read long texts is rarer; it reads the shorter one."""
    counts = {}
    for debt in (1, 400):
        model = Model(10.0)
        grower = Layerwise(model, [], options())
        for _ in range(40):
            grow(grower, draftee("a"), draftee("b"), cost=STEEP)
        model.debts = {"a": debt + 100, "b": debt}
        assert grower.gate is not None
        assert not grower.gate.is_open
        model.asked, model.pass_seconds = [], 0.012
        model.flatness = 5.0  # so that it does not pay either
        for _ in range(1500):
            grow(grower, draftee("a"), draftee("b"), cost=STEEP)
        assert all(asked == ["b"] and trial for asked, trial in model.asked)
        counts[debt] = len(model.asked)
        at_first = 4 * STEEP.seconds(2)
        assert counts[debt] * model.seconds(debt) < 0.005 * 1540 * STEEP.seconds(2) + at_first
    assert counts[1] > 2 * counts[400] > 0


def test_a_new_request_is_tried_with_time_that_the_model_has_saved() -> None:
    """Prose closes the gate; the next request may be one that is easily guessed."""

    def first_steps(saves: bool) -> tuple[list[str], list[str]]:
        model = Model(1e-4 if saves else 0.03)
        model.flatness = 0.05 if saves else 5.0
        grower = asked_often(model, "easy")
        grower.stop("easy")
        model.pass_seconds, model.flatness = 0.03, 5.0
        for _ in range(300):
            grow(grower, draftee("prose"), cost=STEEP)
        assert grower.gate is not None
        assert not grower.gate.is_open
        model.asked = []
        grow(grower, draftee("prose"), cost=STEEP)
        old = [request for asked, _ in model.asked for request in asked]
        grower.stop("prose")
        model.asked, model.debts = [], {"new": 200}
        grow(grower, draftee("new"), cost=STEEP)
        assert all(trial for _, trial in model.asked)
        return old, [request for asked, _ in model.asked for request in asked]

    assert first_steps(saves=True) == ([], ["new"])
    assert first_steps(saves=False) == ([], [])  # there is no time for it yet


def test_what_a_trial_has_overdrawn_stays_owed() -> None:
    """Also where a text is read on the credit of an open gate."""
    model = Model(0.0005)
    model.flatness = 0.05
    grower = asked_often(model, "a")
    assert grower.gate is not None
    assert grower.gate.gain > 0.1
    grower._allowance = -1.0
    model.debts = {"b": 400}
    grow(grower, draftee("b"), cost=STEEP)
    assert model.asked[-1] == (["b"], False)
    assert -1.0 < grower._allowance < -0.9


def test_a_first_text_is_read_before_anything_was_saved() -> None:
    """Once: the next of its kind has to be earned."""
    model = Model(0.001)
    model.flatness = 5.0
    grower = Layerwise(model, [], options())
    model.debts = {"a": 5500}  # 0.11 seconds, more than three steps
    grow(grower, draftee("a"), cost=STEEP)
    assert model.asked == [(["a"], False)]
    model.debts = {"b": 5500}
    grow(grower, draftee("b"), cost=STEEP)
    assert len(model.asked) == 1


@pytest.mark.parametrize("prompt", [0, 1000])
def test_a_prompt_in_the_step_makes_no_text_affordable(prompt: int) -> None:
    """Steps that reading is weighed against are those to come, and the prompt is not in them."""
    for read, affordable in ((5500, True), (40_000, False)):  # 0.11 and 0.8 seconds
        model = Model(0.001)
        grower = Layerwise(model, [], options())
        model.debts = {"a": read}
        grower.grow([draftee("a")], PROMPTS, base_rows=1 + prompt, base_tokens=1.0)
        assert bool(model.asked) == affordable


def test_the_passes_of_a_trial_are_paid_for_too() -> None:
    model, grower = with_closed_gate("prose")
    model.pass_seconds, model.flatness = 0.001, 0.05
    grower._allowance = before = 1.0
    grow(grower, draftee("new"), cost=STEEP)
    assert model.passes
    spent = model.seconds(1) + sum(map(model.seconds, model.passes))
    step = STEEP.seconds(1)
    saved = 0.25 * max(0.0, grower.gate.gain) * step if grower.gate.is_open else 0.0
    assert grower._allowance == pytest.approx(before + 0.005 * step - spent + saved)


def test_a_trial_speaks_neither_for_nor_against_the_other_sources(table_source) -> None:
    """What stops all drafting is told what they promise without it, also where it brings much."""
    for seconds, flatness in ((0.03, 5.0), (0.03, 0.05)):
        model = Model(seconds)
        model.flatness = 5.0
        free = table_source({10: {1: 0.9}, 11: {1: 0.6}}, odds=1.0)
        free.start("prose", [10], greedy=True)
        free.start("new", [11], greedy=True)
        grower = Layerwise(model, [free], options())
        for _ in range(60):
            grow(grower, draftee("prose"), cost=STEEP)
        assert grower.gate is not None
        assert not grower.gate.is_open
        assert grower.spent == 0.0  # nothing was asked
        grower._allowance, begun = 1.0, model.begun
        model.flatness = flatness
        alone = grow(DySpec(Mixture([ModelSource(), free]), options()), draftee("new"), cost=STEEP)
        trees = grow(grower, draftee("new"), cost=STEEP)
        assert model.begun == begun + 1
        assert grower._allowance < 1.0
        told = STEEP.gain(1, trees, grower.spent)
        assert told == pytest.approx(STEEP.gain(1, alone), abs=0.02)  # weights were learnt
        if flatness < 1.0:
            assert STEEP.gain(1, trees) > told + 0.1
    model = Model(1e-4)
    model.flatness = 0.05
    grower = asked_often(model, "easy")
    grow(grower, draftee("easy"), cost=STEEP)
    assert grower.spent > 0.0  # a pass that is made because it pays counts


def test_another_size_of_batch_begins_with_a_trial() -> None:
    model = Model(1e-4)
    model.flatness = 0.05
    grower = Layerwise(model, [], options(max_batch_nodes=32))
    grow(grower, *[draftee(name) for name in "ab"], cost=STEEP)
    model.debts = dict.fromkeys("cdefghij", 40)
    for _ in range(3):
        grow(grower, *[draftee(name) for name in "cdefghij"], cost=STEEP)
    first, second, third = model.asked[:3]
    assert first == (["a", "b"], False)
    assert second == (["c"], True)
    assert third[1] == (third[0] != list("cdefghij"))  # it pays, so all are asked about from now on
    assert len(third[0]) > 1


def test_beside_prompts_the_model_is_asked_where_it_pays_without_them() -> None:
    """What pays in a step that takes long anyway says nothing of the others."""
    for pays in (True, False):
        model = Model(1e-4 if pays else 10.0)
        model.flatness = 0.05 if pays else 5.0
        grower = asked_often(model, "a")
        gate = grower.gate
        assert gate is not None
        before = (gate.is_open, gate.gain, gate.switches)
        assert gate.is_open == pays
        model.asked = []
        for prompt in range(10, 2000, 100):
            grower.grow([draftee("a")], STEEP, base_rows=1 + prompt, base_tokens=1.0)
        assert len(model.asked) == (20 if pays else 0)
        assert (gate.is_open, gate.gain, gate.switches) == before
        assert len(grower._gates) == 1


@pytest.mark.parametrize(("left", "reads"), [(64, True), (5, False)])
def test_a_text_that_is_about_to_end_is_not_read(left: int, reads: bool) -> None:
    """What its reading takes is earned back in the steps that are left."""
    model = Model(0.0005)
    model.flatness = 0.05
    grower = asked_often(model, "a")
    grower._allowance = 0.0
    model.asked, model.debts = [], {"b": 20_000}  # 0.2 seconds
    last = Draftee("b", greedy=True, chain=False, limit=12, left=left)
    grower.grow([last], STEEP, base_rows=1, base_tokens=1.0)
    assert model.asked == ([(["b"], False)] if reads else [])


def test_requests_that_have_ended_are_forgotten() -> None:
    grower = Layerwise(Model(1e-4), [], options())
    for name in "abc":
        grow(grower, draftee(name), cost=STEEP)
        assert grower._asked == {name}
        grower.stop(name)
    assert not grower._asked


def test_new_requests_of_a_model_that_never_pays_take_a_small_share_of_the_time() -> None:
    model, grower = with_closed_gate("first")
    model.asked = []
    spent = 0.0
    for step in range(2000):
        name = f"request {step // 20}"
        model.debts = {name: 100}
        before = len(model.asked)
        grow(grower, draftee(name), cost=STEEP)
        if len(model.asked) > before:
            spent += model.seconds(100) + sum(map(model.seconds, model.passes))
        if step % 20 == 19:
            grower.stop(name)
    assert 0.0 < spent < (0.005 * 2060 + 4.0) * STEEP.seconds(1) + model.seconds(100)
    assert not grower.gate.is_open


def test_what_was_spent_is_told_and_counts() -> None:
    model = Model(0.002)
    model.flatness = 0.05
    grower = Layerwise(model, [], options())
    (tree,) = grow(grower, draftee("a"), cost=STEEP)
    expected = model.seconds(1) + sum(model.seconds(rows) for rows in model.passes)
    assert grower.spent == pytest.approx(expected)
    gain = STEEP.gain(1, [tree], grower.spent)
    assert gain < STEEP.gain(1, [tree])
    grower.grow([draftee("a", 0)], STEEP, base_rows=1, base_tokens=1.0)
    assert grower.spent == 0.0


def test_a_model_that_slows_the_next_step_must_pay_for_that() -> None:
    def used(slower: float) -> int:
        model = Model(0.0)
        model.flatness, model.slower = 0.05, slower
        grower = Layerwise(model, [], options())
        for _ in range(300):
            grow(grower, draftee("a"), cost=STEEP)
        assert grower.spent in (0.0, slower)
        return model.begun

    assert used(0.0) == used(1e-4) == 300
    assert used(10.0) < 60


def test_it_learns_which_source_was_right(table_source) -> None:
    wrong = table_source({10: {20: 0.9}}, odds=1.0)
    wrong.start("a", [10], greedy=True)
    grower = Layerwise(Model(), [wrong], options(), free=True)
    best = max(law(("a",)).items(), key=lambda pair: pair[1])[0]
    shares = []
    for _ in range(60):
        (tree,) = grow(grower, draftee("a", 30))
        probs = {t: p for t, p, parent in zip(tree.tokens, tree.probs, tree.parents) if parent < 0}  # noqa: B905
        shares.append((probs.get(best, 0.0), probs.get(20, 0.0)))
        grower.learn("a", [best])
    assert shares[0][1] > 0.05
    assert shares[-1][1] < shares[0][1] / 2
    assert shares[-1][0] > shares[0][0]
    grower.stop("a")


def test_rasd_prunes_retrieval_by_the_models_first_step(table_source) -> None:
    ranked = sorted(law(("a",)).items(), key=lambda pair: -pair[1])
    likely, unlikely = ranked[0][0], ranked[-1][0]

    def fused(first: int) -> TokenTree:
        # A path that the model's own tree cannot hold beyond its first token.
        retrieved = table_source({10: {first: 0.9}, first: {77: 0.9}})
        retrieved.start("a", [10], greedy=True)
        draft = Layerwise(Model(0.001), [], options())
        retrieval = DySpec(Mixture([retrieved]), options())
        grower = Rasd(draft, retrieval, options(), top_k=2)
        (tree,) = grower.grow([draftee("a", 40)], FREE, base_rows=1, base_tokens=1.0)
        tree.validate()
        assert grower.spent == draft.spent > 0.0
        return tree

    assert 77 in fused(likely).tokens
    assert 77 not in fused(unlikely).tokens


def test_the_same_calls_give_the_same_trees() -> None:
    def run() -> list[list[TokenTree]]:
        grower = Layerwise(Model(0.001), [], options())
        made = []
        for step in range(12):
            made.append(grow(grower, draftee("a"), draftee("b"), cost=STEEP))
            grower.learn("a", [step % 5])
        return made

    assert run() == run()
