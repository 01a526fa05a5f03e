# SPDX-License-Identifier: Apache-2.0
"""The ``vllm.logits_processors`` entry point: one class for both processor interfaces.

vLLM loads this group in every engine and then insists on the interface of its own runner, so an
entry point that is always of one kind would stop engines of the other from starting, even where
nobody uses it. This class is of both kinds by name, and makes the right adaptor when it is called:
the V1 runner passes a device and a flag, the V2 runner its request states. Where the package is
switched off the adaptor does nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as V2LogitsProcessor,
)

from .switch import is_disabled

if TYPE_CHECKING:
    from vllm import SamplingParams


class LogitsProcessor(V1LogitsProcessor, V2LogitsProcessor):
    """Makes the adaptor that the running engine wants.

    Attributes:
        admission: whether the front end vets constraints; set by ``vllm_ext``'s plugin.
    """

    admission: ClassVar[bool] = False

    def __new__(cls, vllm_config: Any, *arguments: Any) -> Any:
        """Return a V1 processor for ``(device, is_pin_memory)``, a V2 one for ``(req_states,)``."""
        if is_disabled():
            from .vllm_inert import InertV1Processor, InertV2Processor

            inert = InertV1Processor if len(arguments) == 2 else InertV2Processor
            return inert(vllm_config, *arguments)
        if len(arguments) == 2:
            from .vllm_v1 import V1Processor

            return V1Processor(vllm_config, *arguments)
        from .vllm_v2 import V2Processor

        return V2Processor(vllm_config, *arguments)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request of ours that cannot be right, whatever the model.

        Where the package is switched off, that is every request of ours: an answer without its
        constraint would look like one with it.

        Raises:
            VLLMValidationError: names the parameter, what was given and what is allowed.
        """
        from .vllm_batch import wants_processor

        if not wants_processor(sampling_params):
            return
        if is_disabled() or not cls.admission:
            raise VLLMValidationError(
                "this engine cannot vet constraints, because vllm-ext's plugin is not active in "
                "it: allow 'vllm_ext' in VLLM_PLUGINS, unset VLLM_EXT_DISABLE, and see what "
                "`vllm-ext doctor` says",
                parameter="extra_args",
            )
        from .vllm_params import check_params

        check_params(sampling_params)
