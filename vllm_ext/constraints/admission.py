# SPDX-License-Identifier: Apache-2.0
"""Refusing a bad constraint when it arrives: HTTP 400 instead of a surprise in the engine.

vLLM asks each processor class to validate the parameters of a request, but tells it neither the
model nor the configuration. So the validator that the front end builds is extended by one that
knows both: it compiles each new constraint once, in a child process that can be killed. Several
children work side by side, so that a slow constraint does not hold up the next. The validator has
to wait for them; a server calls it on the event loop, so its engine client waits there first,
whatever the route that a request came by.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from importlib.metadata import entry_points
from threading import Lock, local
from typing import Any

from logits_processors.compilation import Spec
from logits_processors.constraint import ConstraintError, ConstraintRuntimeError
from logits_processors.engine_options import read_options
from logits_processors.limits import STARVED
from logits_processors.request import ConstraintRequest, Request, parse_request

ATTRIBUTE = "vllm_ext_admission"
"""Where vLLM's ``InputProcessor`` holds its :class:`Admission`."""

GROUP = "vllm.logits_processors"
_MARK = "_vllm_ext_wrapped"
_REMEMBERED = 1024
_CHILDREN = 4
_PATIENCE = 60.0  # seconds, on top of two compilations: a child may have to be started first
_MAX_VERDICT = 2000  # characters


def install() -> None:
    """Extend the validators that vLLM's front ends build from now on, and let servers prepare."""
    _extend_validators()
    _wait_before_requests()


def _extend_validators() -> None:
    from vllm.v1.engine.input_processor import InputProcessor

    from logits_processors.vllm_entry import LogitsProcessor

    LogitsProcessor.admission = True
    original = InputProcessor._build_logits_processors_params_validator
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def build(self: Any) -> Any:
        stock = original(self)
        admission = Admission(self.vllm_config)
        setattr(self, ATTRIBUTE, admission)

        def validate(params: Any) -> None:
            stock(params)
            admission.check(params)

        return validate

    setattr(build, _MARK, True)
    InputProcessor._build_logits_processors_params_validator = build


def _wait_before_requests() -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.async_llm import AsyncLLM

    original = AsyncLLM.add_request
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    async def add_request(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        admission = getattr(self.input_processor, ATTRIBUTE, None)
        arguments = getattr(params, "extra_args", None)
        if admission is not None and arguments:
            try:
                await admission.prepare(arguments)
            except TimeoutError as error:
                raise VLLMValidationError(str(error), parameter="extra_args") from None
        return await original(self, request_id, prompt, params, *args, **kwargs)

    setattr(add_request, _MARK, True)
    AsyncLLM.add_request = add_request


class Admission:
    """Checks the constraints of one engine's requests.

    Args:
        vllm_config: of the engine.

    Raises:
        ValueError: bad options in ``additional_config``.
    """

    def __init__(self, vllm_config: Any) -> None:
        self._processors = _count_processors(vllm_config)
        self._config = vllm_config
        self._limits, _ = read_options(vllm_config.additional_config)
        self._patience = _PATIENCE + 2 * STARVED * self._limits.compile_seconds
        self._lock = Lock()
        self._threads = ThreadPoolExecutor(_CHILDREN, thread_name_prefix="vllm-ext-admission")
        self._own = local()  # of each thread: its child process
        self._loading = Lock()
        self._vocabulary: Any = None
        self._verdicts: OrderedDict[str, Future[str]] = OrderedDict()

    def check(self, params: Any) -> None:
        """Return if the request can be served as it is.

        Raises:
            VLLMValidationError: names the parameter and what the constraint's engine says.
        """
        from vllm.exceptions import VLLMValidationError

        from logits_processors.vllm_batch import wants_processor

        if not wants_processor(params):
            return
        request = parse_request(params.extra_args)
        assert request is not None  # the processor's own validation has passed
        problem = self._engine_problem(request)
        if problem:
            raise VLLMValidationError(problem, parameter="extra_args")
        if isinstance(request, ConstraintRequest):
            parameter = f"extra_args.constraint_{request.spec.kind}"
            try:
                verdict = self._verdict(request.spec).result(self._patience)
            except (TimeoutError, CancelledError):
                verdict = _BUSY
            if verdict:
                raise VLLMValidationError(verdict, parameter=parameter)

    async def prepare(self, arguments: Mapping[str, Any]) -> None:
        """Reach the verdict on a request's constraint without blocking the event loop.

        A server validates on the event loop; there :meth:`check` then has nothing to wait for.

        Args:
            arguments: the request's extra arguments; bad ones are left to the validation.

        Raises:
            TimeoutError: too many other constraints are being compiled.
        """
        try:
            request = parse_request(arguments)
        except ConstraintError:
            return
        if isinstance(request, ConstraintRequest):
            verdict = asyncio.wrap_future(self._verdict(request.spec))
            done, _ = await asyncio.wait([verdict], timeout=self._patience)
            if not done or verdict.cancelled():
                raise TimeoutError(_BUSY)
            verdict.exception()  # for :meth:`check` to raise, if there is one

    def _engine_problem(self, request: Request) -> str:
        """Say why this engine cannot serve the request, or nothing."""
        from vllm_ext.config import is_ours

        config = self._config
        if self._processors > 1:
            return (
                "this engine loads the constraint processor of vllm-ext more than once, and each "
                "would edit the other's rows: leave it out of --logits-processors, its entry point "
                f"in the group {GROUP!r} is enough (and is offered by one distribution only)"
            )
        if not self._processors:
            return (
                "this engine has no constraint processor: the entry point of vllm-ext in the "
                f"group {GROUP!r} is missing from the installed metadata; install vllm-ext again"
            )
        if config.model_config.skip_tokenizer_init:
            return "constraints need the tokenizer, which this engine was told to skip"
        speculative = config.speculative_config
        if config.use_v2_model_runner:
            if speculative is not None and not isinstance(request, ConstraintRequest):
                return "mirostat and momentum do not run under Model Runner V2's speculation"
            return ""
        if speculative is not None and not is_ours(speculative):
            return (
                f"speculative method {speculative.method!r} drops logits processors in vLLM; "
                "use one of vllm-ext's methods, or no speculation"
            )
        asynchronous = config.scheduler_config.async_scheduling
        if asynchronous and not isinstance(request, ConstraintRequest):
            return (
                "mirostat and momentum need the last token, which asynchronous scheduling hides; "
                "start the engine with --no-async-scheduling"
            )
        return ""

    def _verdict(self, spec: Spec) -> Future[str]:
        """Return what is wrong with a constraint, ``""`` if nothing; remembered."""
        from logits_processors.limits import check_source

        text = json.dumps([spec.kind, spec.source, spec.argument])
        key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        with self._lock:
            verdict = self._verdicts.get(key)
            if verdict is None or _broken(verdict):
                try:
                    check_source(spec.source, spec.kind, self._limits)
                    verdict = self._threads.submit(self._vet, spec)
                except ConstraintError as error:
                    verdict = Future()
                    verdict.set_result(str(error))
                self._verdicts[key] = verdict
            self._verdicts.move_to_end(key)
            if len(self._verdicts) > _REMEMBERED:
                self._verdicts.popitem(last=False)[1].cancel()
        return verdict

    def _vet(self, spec: Spec) -> str:
        from logits_processors.compilation import compile_constraint
        from logits_processors.vetting import Vetter
        from logits_processors.vllm_batch import load_vocabulary

        with self._loading:
            if self._vocabulary is None:
                self._vocabulary = load_vocabulary(self._config)
        try:
            if spec.kind == "predicate":
                compile_constraint(spec, self._vocabulary, self._limits)
            else:
                if not hasattr(self._own, "vetter"):
                    self._own.vetter = Vetter(self._vocabulary, self._limits)
                self._own.vetter.check(spec.kind, spec.source)
        except (ConstraintError, ConstraintRuntimeError) as error:
            return str(error)[:_MAX_VERDICT]
        return ""


def _broken(verdict: Future[str]) -> bool:
    """Tell whether no verdict was reached, through no fault of the constraint."""
    return verdict.done() and (verdict.cancelled() or verdict.exception() is not None)


_BUSY = (
    "too many constraints are waiting to be compiled; send the request again in a while, or "
    "constraints that are simpler"
)


def _count_processors(vllm_config: Any) -> int:
    """Return how often vLLM will load our processor: as an entry point, or because it was named."""
    from logits_processors.vllm_entry import LogitsProcessor

    target = f"{LogitsProcessor.__module__}:{LogitsProcessor.__qualname__}"
    named = vllm_config.model_config.logits_processors or ()
    offered = [entry.value for entry in entry_points(group=GROUP)]
    return sum(each in (LogitsProcessor, target) for each in (*named, *offered))
