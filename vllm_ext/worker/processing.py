# SPDX-License-Identifier: Apache-2.0
"""Logits processors while a tree is walked: vLLM's, other people's, and what ours need besides."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vllm.v1.worker import gpu_model_runner

from logits_processors.vllm_v1 import V1Processor
from proposers.tree import TokenTree


class ProcessorsMixin:
    """Goes before a V1 runner class in the bases of a subclass."""

    def _prune_forbidden(
        self: Any, trees: dict[str, TokenTree], request_ids: Sequence[str]
    ) -> None:
        """Drop drafted nodes that a constraint forbids: they cost rows and cannot be drawn."""
        processors = [p for p in self.input_batch.logitsprocs.all if isinstance(p, V1Processor)]
        for row, request_id in enumerate(request_ids):
            tree = trees.get(request_id)
            if not tree:
                continue
            for processor in processors:
                keep = processor.viable(row, tree.tokens, tree.parents)
                if keep is not None:
                    trees[request_id] = tree = tree.pruned(keep)

    def _update_processors(self: Any, live: Sequence[int]) -> None:
        """Between levels: processors look at the output tokens, which now end in the path.

        Ours are also told whose draw is thrown away: what they learn from draws must not see those.
        """
        for processor in self.input_batch.logitsprocs.all:
            processor.update_state(None)
            if isinstance(processor, V1Processor):
                processor.idle = set(range(self.input_batch.num_reqs)) - set(live)

    @contextmanager
    def _processors_walking(self: Any) -> Iterator[None]:
        """Outside the walk every row's draw counts."""
        try:
            yield
        finally:
            for processor in self.input_batch.logitsprocs.all:
                if isinstance(processor, V1Processor):
                    processor.idle = ()


@contextmanager
def processors_built_under_speculation() -> Iterator[None]:
    """Let vLLM build min_p, logit_bias and custom logits processors although speculation is on.

    The stock function refuses or drops them because its rejection sampler would ignore them; the
    walk honours them.  The name is replaced in the runner's module only while the runner is made.
    """
    original = gpu_model_runner.build_logitsprocs

    def build(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = copy.copy(vllm_config)
        hidden.speculative_config = None
        return original(hidden, *args, **kwargs)

    gpu_model_runner.build_logitsprocs = build
    try:
        yield
    finally:
        gpu_model_runner.build_logitsprocs = original
