# SPDX-License-Identifier: Apache-2.0
"""Drafts travel with the sampled tokens instead of in a message of their own.

After each step vLLM's scheduler asks the worker for its drafts (``EngineCore.post_step``). Where
workers are processes that is a second message and its reply between two forward passes, which every
step pays, whether anything was drafted or not. Our drafts are known when the step's tokens are, so
the worker encloses them there (`enclose`), and the executor answers the question from what it has
received. Where nothing is enclosed, by any other worker, vLLM's own message is sent.
"""

from __future__ import annotations

import functools
from typing import Any

ATTRIBUTE = "vllm_ext_drafts"
"""Attribute of vLLM's ``ModelRunnerOutput``, and of the executor that has received it: a tuple of
one, vLLM's ``DraftTokenIds`` or ``None``."""

_MARK = "_vllm_ext_wrapped"


def enclose(output: Any, drafts: Any) -> Any:
    """Put a step's drafts into its output.

    Args:
        output: what the runner's ``sample_tokens`` returned. Only that of a step with requests is
            written to: vLLM shares one object among all empty ones.
        drafts: what the runner's ``take_draft_token_ids`` returns after it.

    Returns:
        `output`.
    """
    if getattr(output, "req_ids", None):
        setattr(output, ATTRIBUTE, (drafts,))
    return output


def install() -> None:
    """Let vLLM's multi-process executor look for enclosed drafts first."""
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    original_sample = MultiprocExecutor.sample_tokens
    original_take = MultiprocExecutor.take_draft_token_ids
    if getattr(original_take, _MARK, False):
        return

    @functools.wraps(original_sample)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original_sample(self, *args, **kwargs)
        # A future has nothing enclosed yet: then vLLM's message is sent.
        setattr(self, ATTRIBUTE, getattr(output, ATTRIBUTE, None))
        return output

    @functools.wraps(original_take)
    def take_draft_token_ids(self: Any) -> Any:
        enclosed = getattr(self, ATTRIBUTE, None)
        setattr(self, ATTRIBUTE, None)
        return original_take(self) if enclosed is None else enclosed[0]

    setattr(take_draft_token_ids, _MARK, True)
    MultiprocExecutor.sample_tokens = sample_tokens
    MultiprocExecutor.take_draft_token_ids = take_draft_token_ids
