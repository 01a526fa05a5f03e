# SPDX-License-Identifier: Apache-2.0
"""The class that ``SpeculativeConfig.model`` names: a guard, for the runner drafts itself."""

from __future__ import annotations

from typing import Any, NoReturn


class TreeProposer:
    """Stands where vLLM's ``custom_class`` wants a proposer.

    Drafting needs logits, request ids and sampling parameters, which ``propose`` does not get; the
    runner subclass of this package has them.  If ``propose`` is ever called, that runner is not in
    place.
    """

    def __init__(self, vllm_config: Any) -> None:
        del vllm_config

    def load_model(self, target_model: Any) -> None:
        """Nothing to load: called by the CPU runner for every drafter."""

    def propose(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: the stock runner is running.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "vllm-ext: the speculative method was configured without our worker (worker_cls was "
            'replaced). Use {"method": "dyspec"} and leave --worker-cls alone.'
        )
