# SPDX-License-Identifier: Apache-2.0
"""Refusing a bad constraint when it arrives: HTTP 400 instead of a surprise in the engine.

vLLM asks each processor class to validate the parameters of a request, but tells it neither the
model nor the configuration. So the validator that the front end builds is extended by one that
knows both: it compiles each new constraint once, in a child process that can be killed.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from threading import Lock
from typing import Any

from logits_processors.compilation import Spec
from logits_processors.constraint import ConstraintError
from logits_processors.request import ConstraintRequest, Request

_MARK = "_vllm_ext_wrapped"
_REMEMBERED = 1024


def install() -> None:
    """Extend the validators that vLLM's front end builds from now on."""
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

        def validate(params: Any) -> None:
            stock(params)
            admission.check(params)

        return validate

    setattr(build, _MARK, True)
    InputProcessor._build_logits_processors_params_validator = build


class Admission:
    """Checks the constraints of one engine's requests.

    Args:
        vllm_config: of the engine.

    Raises:
        ValueError: bad options in ``additional_config``.
    """

    def __init__(self, vllm_config: Any) -> None:
        from logits_processors.vllm_batch import read_options

        self._config = vllm_config
        self._limits, _ = read_options(vllm_config)
        self._lock = Lock()
        self._vetter: Any = None
        self._vocabulary: Any = None
        self._verdicts: OrderedDict[Spec, str] = OrderedDict()

    def check(self, params: Any) -> None:
        """Return if the request can be served as it is.

        Raises:
            VLLMValidationError: names the parameter and what the constraint's engine says.
        """
        from vllm.exceptions import VLLMValidationError

        from logits_processors.request import parse_request
        from logits_processors.vllm_batch import wants_processor

        if not wants_processor(params):
            return
        request = parse_request(params.extra_args)
        assert request is not None  # the processor's own validation has passed
        problem = self._engine_problem(request)
        if problem:
            raise VLLMValidationError(problem, parameter="extra_args")
        if isinstance(request, ConstraintRequest):
            verdict = self._verdict(request.spec)
            if verdict:
                raise VLLMValidationError(
                    verdict, parameter=f"extra_args.constraint_{request.spec.kind}"
                )

    def _engine_problem(self, request: Request) -> str:
        """Say why this engine cannot serve the request, or nothing."""
        from vllm_ext.config import is_ours

        config = self._config
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

    def _verdict(self, spec: Spec) -> str:
        """Return what is wrong with a constraint, ``""`` if nothing; remembered."""
        with self._lock:
            known = self._verdicts.get(spec)
        if known is not None:
            return known
        try:
            self._vet(spec)
            verdict = ""
        except ConstraintError as error:
            verdict = str(error)
        with self._lock:
            self._verdicts[spec] = verdict
            if len(self._verdicts) > _REMEMBERED:
                self._verdicts.popitem(last=False)
        return verdict

    def _vet(self, spec: Spec) -> None:
        from logits_processors.compilation import compile_constraint
        from logits_processors.limits import check_source
        from logits_processors.vetting import Vetter
        from logits_processors.vllm_batch import load_vocabulary

        check_source(spec.source, spec.kind, self._limits)
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = load_vocabulary(self._config)
                self._vetter = Vetter(self._vocabulary, self._limits)
        if spec.kind == "predicate":
            compile_constraint(spec, self._vocabulary, self._limits)
        else:
            self._vetter.check(spec.kind, spec.source)
