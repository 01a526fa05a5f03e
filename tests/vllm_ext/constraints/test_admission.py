# SPDX-License-Identifier: Apache-2.0
"""Requests are judged once, off the event loop, and a slow constraint holds up nobody else."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor

from logits_processors import predicate, vllm_batch
from logits_processors.constraint import ConstraintError
from logits_processors.vetting import Vetter
from logits_processors.vocabulary import Vocabulary
from vllm_ext.constraints import admission as module
from vllm_ext.constraints.admission import ATTRIBUTE, Admission, install

BYTES = Vocabulary((*(bytes([i]) for i in range(256)), b""), eos_ids=(256,))
HANGS = "\n".join(
    [
        'root ::= r0 "b"',
        *(f"r{i} ::= r{i + 1} | r{i + 1} r{i + 1}" for i in range(40)),
        'r40 ::= "a" | ""',
    ]
)


def config(**options: Any) -> Any:
    return SimpleNamespace(
        additional_config={"vllm_ext_constraints": options.pop("limits", {})},
        use_v2_model_runner=options.get("v2", False),
        speculative_config=options.get("speculative"),
        scheduler_config=SimpleNamespace(async_scheduling=options.get("asynchronous", False)),
        model_config=SimpleNamespace(
            skip_tokenizer_init=options.get("no_tokenizer", False), logits_processors=None
        ),
    )


def asks(**keys: Any) -> SamplingParams:
    return SamplingParams(extra_args=keys)


@pytest.fixture(autouse=True)
def vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_batch, "load_vocabulary", lambda _: BYTES)


@pytest.fixture
def vetted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sources that reached a compiler, which here refuses what says so."""
    seen: list[str] = []

    def check(self: Any, kind: str, source: str) -> None:
        seen.append(source)
        if "bad" in source:
            raise ConstraintError(f"{kind}: line 1, column 2: " + source)

    monkeypatch.setattr(Vetter, "check", check)
    return seen


def test_an_engine_without_the_processor_refuses(
    vetted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text without the constraint that was asked for is not an option."""
    monkeypatch.setattr(module, "entry_points", lambda **_: ())
    with pytest.raises(VLLMValidationError, match="install vllm-ext again"):
        Admission(config()).check(asks(constraint_regex="a"))
    named = config()
    named.model_config.logits_processors = ["logits_processors.vllm_entry:LogitsProcessor"]
    Admission(named).check(asks(constraint_regex="a"))
    assert vetted == ["a"]


@pytest.mark.parametrize("named", ["class", "name", "entry point"])
def test_a_processor_that_is_loaded_twice_is_refused(
    monkeypatch: pytest.MonkeyPatch, vetted: list[str], named: str
) -> None:
    """Two of them would edit one row one after the other, and neither would know."""
    from logits_processors.vllm_entry import LogitsProcessor

    name = "logits_processors.vllm_entry:LogitsProcessor"
    once = SimpleNamespace(value=name)
    monkeypatch.setattr(module, "entry_points", lambda **_: (once,))
    engine = config()
    Admission(engine).check(asks(constraint_regex="a"))
    if named == "entry point":
        monkeypatch.setattr(module, "entry_points", lambda **_: (once, once))
    else:
        engine.model_config.logits_processors = [LogitsProcessor if named == "class" else name]
    with pytest.raises(VLLMValidationError, match="more than once"):
        Admission(engine).check(asks(constraint_regex="a"))


def test_a_verdict_is_reached_once(vetted: list[str]) -> None:
    admission = Admission(config())
    for _ in range(3):
        admission.check(asks(constraint_regex="a"))
        with pytest.raises(VLLMValidationError, match="line 1, column 2") as refusal:
            admission.check(asks(constraint_regex="bad"))
        assert refusal.value.parameter == "extra_args.constraint_regex"
    assert vetted == ["a", "bad"]
    admission.check(asks(constraint_lark="a", constraint_id="another"))
    assert vetted == ["a", "bad", "a"]


def test_requests_of_others_are_not_looked_at(vetted: list[str]) -> None:
    admission = Admission(config(no_tokenizer=True))
    for extra in (None, {}, {"other": "a"}, {1: 2}):
        admission.check(SamplingParams(extra_args=extra))
    assert vetted == []


@pytest.mark.usefixtures("vetted")
def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REMEMBERED", 5)
    admission = Admission(config(limits={"max_bytes": 100}))
    for i in range(20):
        admission.check(asks(constraint_regex=f"a{i}"))
        with pytest.raises(VLLMValidationError, match="max_bytes"):
            admission.check(asks(constraint_regex=f"{i}" + "a" * 10**5))
        with pytest.raises(VLLMValidationError, match="column"):
            admission.check(asks(constraint_regex=f"bad {i}"))
    assert len(admission._verdicts) == 5
    assert sum(map(len, admission._verdicts)) < 1000  # not the sources themselves


@pytest.mark.usefixtures("vetted")
def test_long_messages_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VLLMValidationError) as refusal:
        Admission(config()).check(asks(constraint_regex="bad" * 10**5))
    assert len(str(refusal.value)) < 3000


OURS = SimpleNamespace(method="custom_class", model=None)
THEIRS = SimpleNamespace(method="ngram", model="x")
MIROSTAT = {"mirostat_version": 2}
MOMENTUM = {"momentum_alpha": 0.5}
REGEX = {"constraint_regex": "a"}


@pytest.mark.usefixtures("vetted")
@pytest.mark.parametrize(
    ("options", "keys", "problem"),
    [
        ({}, REGEX, None),
        ({}, MIROSTAT, None),
        ({"no_tokenizer": True}, REGEX, "tokenizer"),
        ({"speculative": THEIRS}, REGEX, "'ngram' drops logits processors"),
        ({"speculative": OURS}, REGEX, None),
        ({"speculative": OURS}, MOMENTUM, None),
        ({"speculative": THEIRS, "v2": True}, REGEX, None),
        ({"speculative": THEIRS, "v2": True}, MIROSTAT, "Model Runner V2's speculation"),
        ({"v2": True}, MOMENTUM, None),
        ({"asynchronous": True}, REGEX, None),
        ({"asynchronous": True}, MIROSTAT, "--no-async-scheduling"),
        ({"asynchronous": True, "v2": True}, MOMENTUM, None),
    ],
)
def test_what_an_engine_can_serve(options: Any, keys: Any, problem: str | None) -> None:
    from vllm_ext.config import PLACEHOLDER_CLASS

    OURS.model = PLACEHOLDER_CLASS
    admission = Admission(config(**options))
    if problem is None:
        admission.check(asks(**keys))
    else:
        with pytest.raises(VLLMValidationError, match=problem):
            admission.check(asks(**keys))


class Language:
    def __init__(self, argument: str) -> None:
        if argument == "typo":
            raise KeyError("a bug")
        self.argument = argument

    def prefix(self, text: str) -> bool:
        if self.argument == "raises":
            raise RuntimeError("a bug")
        return self.argument != "empty"

    complete = prefix


@pytest.mark.parametrize(
    ("argument", "problem"),
    [("fine", None), ("typo", "refuses its argument"), ("raises", "a bug"), ("empty", "is empty")],
)
def test_predicates(argument: str, problem: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predicate, "_find", lambda name: Language)
    admission = Admission(config())
    asked = asks(constraint_predicate="toy", constraint_argument=argument)
    if problem is None:
        admission.check(asked)
    else:
        with pytest.raises(VLLMValidationError, match=problem):
            admission.check(asked)


def test_what_is_no_fault_of_the_constraint_is_not_remembered(
    monkeypatch: pytest.MonkeyPatch, vetted: list[str]
) -> None:
    admission = Admission(config())

    def broken(_: Any) -> Any:
        raise OSError("no tokenizer today")

    monkeypatch.setattr(vllm_batch, "load_vocabulary", broken)
    with pytest.raises(OSError, match="today"):
        admission.check(asks(constraint_regex="a"))
    monkeypatch.setattr(vllm_batch, "load_vocabulary", lambda _: BYTES)
    admission.check(asks(constraint_regex="a"))
    assert vetted == ["a"]


def test_a_slow_constraint_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its neighbours nor the event loop; and one verdict serves all who ask."""
    go, started = threading.Event(), threading.Event()
    vetted: list[str] = []

    def check(self: Any, kind: str, source: str) -> None:
        vetted.append(source)
        if source == "slow":
            started.set()
            go.wait()

    monkeypatch.setattr(Vetter, "check", check)
    admission = Admission(config())

    async def serve() -> None:
        slow = [
            asyncio.create_task(admission.prepare({"constraint_regex": "slow"})) for _ in range(3)
        ]
        while not started.is_set():
            await asyncio.sleep(0)  # the loop turns while the constraint is compiled
        await admission.prepare({"constraint_regex": "quick"})
        admission.check(asks(constraint_regex="quick"))
        assert not any(task.done() for task in slow)
        slow[0].cancel()  # a client that hangs up must not take the verdict of the others along
        await asyncio.sleep(0)
        go.set()
        await asyncio.gather(*slow[1:])

    try:
        asyncio.run(serve())
    finally:
        go.set()
    admission.check(asks(constraint_regex="slow"))
    assert sorted(vetted) == ["quick", "slow"]


def test_one_compiler_would_hold_up_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the test above, and what a full house is told."""
    monkeypatch.setattr(module, "_CHILDREN", 1)
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    go = threading.Event()
    monkeypatch.setattr(Vetter, "check", lambda *_: go.wait())
    admission = Admission(config(limits={"compile_seconds": 0.01}))
    try:
        for source in ("slow", "quick"):
            with pytest.raises(TimeoutError, match="waiting to be compiled"):
                asyncio.run(admission.prepare({"constraint_regex": source}))
            with pytest.raises(VLLMValidationError, match="waiting to be compiled"):
                admission.check(asks(constraint_regex=source))
    finally:
        go.set()


def test_a_verdict_that_was_pushed_out_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHILDREN", 1)
    monkeypatch.setattr(module, "_REMEMBERED", 2)
    go = threading.Event()
    monkeypatch.setattr(Vetter, "check", lambda *_: go.wait())
    admission = Admission(config())

    async def serve() -> list[Any]:
        tasks = [
            asyncio.create_task(admission.prepare({"constraint_regex": f"a{i}"})) for i in range(5)
        ]
        while len(admission._verdicts) < 2 or not all(task.done() for task in tasks[1:3]):
            await asyncio.sleep(0)
        go.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    try:
        outcomes = asyncio.run(serve())
    finally:
        go.set()
    assert {type(outcome) for outcome in outcomes} == {TimeoutError, type(None)}
    assert outcomes[-1] is None


def test_bad_keys_are_left_to_the_validation() -> None:
    admission = Admission(config())
    for keys in ({"constraint_regex": 1}, {"constraint_nothing": "a"}, {}, MIROSTAT):
        asyncio.run(admission.prepare(keys))
    assert not admission._verdicts


def test_a_grammar_that_hangs_the_compiler() -> None:
    """In a real child process: refused in its own time, and the next request is served."""
    admission = Admission(config(limits={"compile_seconds": 5.0}))
    with pytest.raises(VLLMValidationError, match=r"compile_seconds|check_seconds"):
        admission.check(asks(constraint_ebnf=HANGS))
    admission.check(asks(constraint_regex_partial="a"))
    with pytest.raises(VLLMValidationError, match=r"compile_seconds|check_seconds"):
        admission.check(asks(constraint_ebnf=HANGS, constraint_seed=1))  # remembered


def test_the_front_ends_validator_is_extended_once(
    monkeypatch: pytest.MonkeyPatch, vetted: list[str]
) -> None:
    from logits_processors.vllm_entry import LogitsProcessor

    called: list[Any] = []

    def stock(self: Any) -> Any:
        return called.append

    monkeypatch.setattr(InputProcessor, "_build_logits_processors_params_validator", stock)
    monkeypatch.setattr(LogitsProcessor, "admission", False)
    monkeypatch.setattr(AsyncLLM, "add_request", AsyncLLM.add_request)  # put back afterwards
    install()
    once = InputProcessor._build_logits_processors_params_validator
    install()
    assert InputProcessor._build_logits_processors_params_validator is once
    assert LogitsProcessor.admission is True
    front: Any = SimpleNamespace(vllm_config=config())
    validate = once(front)
    assert isinstance(getattr(front, ATTRIBUTE), Admission)
    validate(asks(constraint_regex="a"))
    with pytest.raises(VLLMValidationError):
        validate(asks(constraint_regex="bad"))
    assert len(called) == 2  # vLLM's own validation comes first
    assert vetted == ["a", "bad"]


@pytest.mark.parametrize("waits", [True, False])
def test_a_server_waits_outside_its_validator(monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    """Whatever the route: the loop turns while a constraint is compiled, and not without us."""
    go = threading.Event()

    def check(self: Any, kind: str, source: str) -> None:
        go.wait(5.0)
        if source == "bad":
            raise ConstraintError("no")

    async def stock(self: Any, request_id: str, prompt: Any, params: Any, priority: int = 0) -> Any:
        admission.check(params)
        return request_id, priority

    monkeypatch.setattr(Vetter, "check", check)
    monkeypatch.setattr(AsyncLLM, "add_request", stock)
    if waits:
        install()
        once = AsyncLLM.add_request
        install()
        assert AsyncLLM.add_request is once
    admission = Admission(config())
    engine: Any = SimpleNamespace(input_processor=SimpleNamespace())
    setattr(engine.input_processor, ATTRIBUTE, admission)
    turned = False

    async def neighbour() -> None:
        nonlocal turned
        await asyncio.sleep(0)
        turned = not go.is_set()
        go.set()

    async def serve(source: str) -> Any:
        asked = asks(constraint_regex=source)
        go.clear()
        if not waits:
            threading.Timer(0.2, go.set).start()
        beside = asyncio.create_task(neighbour())
        await asyncio.sleep(0)
        try:
            return await AsyncLLM.add_request(engine, "r", "prompt", asked, priority=3)
        finally:
            await beside

    assert asyncio.run(serve("a")) == ("r", 3)
    assert turned is waits
    with pytest.raises(VLLMValidationError, match="no"):
        asyncio.run(serve("bad"))


def test_a_server_with_a_full_house_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def stock(self: Any, request_id: str, prompt: Any, params: Any) -> Any:
        return request_id

    async def prepare(arguments: Any) -> None:
        raise TimeoutError("busy")

    monkeypatch.setattr(AsyncLLM, "add_request", stock)
    install()
    engine: Any = SimpleNamespace(input_processor=SimpleNamespace())
    setattr(engine.input_processor, ATTRIBUTE, SimpleNamespace(prepare=prepare))
    with pytest.raises(VLLMValidationError, match="busy"):
        asyncio.run(AsyncLLM.add_request(engine, "r", "p", asks(constraint_regex="a")))
    assert asyncio.run(AsyncLLM.add_request(engine, "r", "p", SamplingParams())) == "r"
