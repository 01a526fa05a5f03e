# SPDX-License-Identifier: Apache-2.0
"""When a row can be sampled apart from its batch, and what the Sampler needs for that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.sampler import Sampler

from logits_processors.vllm_v1 import V1Processor


def why_sequential(sampler: Any, metadata: Any) -> str | None:
    """Why this batch needs the sequential walk, or ``None``.

    A row can be sampled before it is visited only if its law depends on its logits and on constants
    of its request: temperature, top-k, top-p, allowed tokens, a grammar's mask (in the logits
    already).  Whatever looks at the tokens before it, or reports on the visited row, cannot.

    Args:
        sampler: the runner's sampler.
        metadata: vLLM's ``SamplingMetadata`` of the batch.
    """
    if type(sampler) is not Sampler:
        return f"sampler {type(sampler).__name__}"
    if getattr(sampler, "use_fp64_gumbel", False):
        return "float64 noise"
    if metadata.max_num_logprobs is not None or metadata.logprob_token_ids:
        return "logprobs"
    if not metadata.no_penalties:
        return "penalties"
    if metadata.bad_words_token_ids:
        return "bad words"
    holder = getattr(metadata, "thinking_budget_state_holder", None)
    if holder is not None and holder.has_tracked_requests():
        return "thinking budget"
    for processor in metadata.logitsprocs.all:
        if not _is_idle(processor):
            return f"logits processor {type(processor).__name__}"
    return None


def _is_idle(processor: Any) -> bool:
    """Whether a processor changes no request of this batch; what is not known may always."""
    if type(processor) is MinTokensLogitsProcessor:
        return not processor.min_toks
    if type(processor) is LogitBiasLogitsProcessor:
        return not processor.biases
    if type(processor) is MinPLogitsProcessor:
        return not processor.min_p_count
    if type(processor) is V1Processor:
        return not processor.in_use
    return False


def part_of(metadata: Any, requests: Sequence[int]) -> Any:
    """The ``SamplingMetadata`` of some requests of a batch for which `why_sequential` is ``None``.

    What that excludes (penalties, bad words, processors in use) stays as it is, unread.

    Args:
        metadata: of the batch.
        requests: their places in the batch, which become 0, 1, ...
    """
    places = torch.tensor(requests)
    chosen: dict[str, Any] = {
        name: value.index_select(0, places.to(value.device))
        for name in ("temperature", "top_k", "top_p", "allowed_token_ids_mask")
        if (value := getattr(metadata, name)) is not None
    }
    generators = {
        place: metadata.generators[request]
        for place, request in enumerate(requests)
        if request in metadata.generators
    }
    return replace(metadata, generators=generators, **chosen)
