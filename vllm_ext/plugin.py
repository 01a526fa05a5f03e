# SPDX-License-Identifier: Apache-2.0
"""The ``vllm.general_plugins`` entry point.

vLLM calls :func:`register` in every process (front end, engine core, workers, model inspection),
some of them several times: it must be quick, idempotent and must not raise for users who use none
of our methods.
"""

from __future__ import annotations

import functools
import logging
import re
from typing import TYPE_CHECKING, Any

from logits_processors.switch import is_disabled

if TYPE_CHECKING:
    from pydantic import ValidationError

    from vllm_ext.hooks import Hook

logger = logging.getLogger("vllm.vllm_ext")

_MARK = "_vllm_ext_wrapped"


def register() -> None:
    """Install the front-end hooks; without effect if ``VLLM_EXT_DISABLE=1``."""
    if is_disabled():
        return
    try:
        import vllm
    except ImportError as error:
        raise ImportError(
            "vllm-ext needs vLLM: pip install 'vllm-ext[cpu]' (CPUs) or 'vllm-ext[cuda]' (GPUs)"
        ) from error

    from vllm_ext import hooks

    broken = [report for report in hooks.check(hooks.FRONTEND) if not report.ok]
    if broken:
        # Users of none of our methods must not suffer; those who ask for one are refused by vLLM's
        # own validation of the method's name, right after this line.
        names = ", ".join(report.target for report in broken)
        logger.error("vllm-ext is inactive: this vLLM (%s) lacks %s", vllm.__version__, names)
        return
    _wrap_add_cli_args()
    _wrap_create_speculative_config()
    _wrap_validate_spec_decode()
    _wrap_num_lookahead_tokens()
    _install_enclosed()
    _install_constraints()


def _install_enclosed() -> None:
    """Let drafts travel with the sampled tokens; without it they take a message of their own."""
    from vllm_ext import enclosed, hooks

    lacking = _lacking(hooks.EXECUTOR)
    if lacking:
        logger.warning("vllm-ext: drafts take a message of their own: this vLLM lacks %s", lacking)
        return
    enclosed.install()


def _lacking(wanted: tuple[Hook, ...]) -> str:
    """The hooks that do not fit this vLLM, by name; empty if all do."""
    from vllm_ext import hooks

    return ", ".join(report.target for report in hooks.check(wanted) if not report.ok)


def _install_constraints() -> None:
    """Let requests use constraints; without it they are refused by the processor's validation."""
    from vllm_ext import hooks

    lacking = _lacking(hooks.CONSTRAINTS)
    if lacking:
        logger.error("vllm-ext: constraints are off: this vLLM lacks %s", lacking)
        return
    from vllm_ext.constraints import admission, records

    admission.install()
    records.install()


@functools.cache
def warn_if_untested() -> None:
    """Warn once per process about a vLLM release that this package was not tested with."""
    import vllm

    from vllm_ext.hooks import TESTED_VERSIONS

    if ".".join(vllm.__version__.split(".")[:2]) not in TESTED_VERSIONS:
        logger.warning(
            "vllm-ext was tested with vLLM %s, not %s; run `vllm-ext doctor` and `vllm-ext verify`",
            ", ".join(TESTED_VERSIONS),
            vllm.__version__,
        )


def _wrap_add_cli_args() -> None:
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.add_cli_args
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        from vllm_ext.methods import METHODS

        parser = original(parser)
        action = parser._option_string_actions.get("--spec-method")
        if action is not None and action.choices is not None:
            action.choices = [*action.choices, *METHODS]
        return parser

    setattr(add_cli_args, _MARK, True)
    EngineArgs.add_cli_args = staticmethod(add_cli_args)


def _wrap_create_speculative_config() -> None:
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_speculative_config
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def create_speculative_config(
        self: Any, target_model_config: Any, target_parallel_config: Any
    ) -> Any:
        from pydantic import ValidationError
        from vllm.engine.arg_utils import AsyncEngineArgs

        from logits_processors import engine_options
        from vllm_ext import background
        from vllm_ext.config import is_ours, read_options, translate
        from vllm_ext.worker.metrics import share_with_workers

        # Bad options of constraints are refused before any process starts.
        engine_options.read_options(self.additional_config)
        translate(self, target_model_config, target_parallel_config)
        try:
            config = original(
                self,
                target_model_config=target_model_config,
                target_parallel_config=target_parallel_config,
            )
        except ValidationError as error:
            raise (_unknown_method(error) or error) from None
        if is_ours(config):
            warn_if_untested()
            share_with_workers()
            _, options = read_options(self)
            background.warn_if_impossible(
                getattr(options, "prime", "off"), server=isinstance(self, AsyncEngineArgs)
            )
        return config

    setattr(create_speculative_config, _MARK, True)
    EngineArgs.create_speculative_config = create_speculative_config


def _unknown_method(error: ValidationError) -> Exception | None:
    """Our error, with the names of ours, where vLLM has refused the name of a method."""
    from vllm_ext.methods import unknown_method

    for problem in error.errors():
        if problem["loc"] == ("method",) and problem["type"] == "literal_error":
            theirs = re.findall("'([^']+)'", problem["ctx"]["expected"])
            return unknown_method(problem["input"], theirs)
    return None


def _wrap_num_lookahead_tokens() -> None:
    from vllm.config import VllmConfig

    original = getattr(VllmConfig, "num_lookahead_tokens", None)
    if original is None or getattr(original.fget, _MARK, False):
        return  # draft models are refused by name where it is missing, see hooks.DRAFT

    @functools.wraps(original.fget)
    def num_lookahead_tokens(self: Any) -> int:
        from vllm_ext.config import draft_slots

        return int(original.fget(self)) + draft_slots(self)

    setattr(num_lookahead_tokens, _MARK, True)
    VllmConfig.num_lookahead_tokens = property(num_lookahead_tokens)


def _wrap_validate_spec_decode() -> None:
    from vllm.sampling_params import SamplingParams

    original = SamplingParams._validate_spec_decode
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
        from vllm_ext.config import is_ours
        from vllm_ext.request_options import RequestOptionError, node_cap

        if not is_ours(speculative_config):
            original(self, speculative_config)
            return
        try:
            node_cap(self.extra_args)
        except RequestOptionError as error:
            # The one kind of exception that the server answers with HTTP 400.
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError(str(error), parameter=f"extra_args.{error.key}") from None

    setattr(_validate_spec_decode, _MARK, True)
    SamplingParams._validate_spec_decode = _validate_spec_decode
