# SPDX-License-Identifier: Apache-2.0
"""Primed tables of ``vllm-ext prime`` (`proposers.prime`) as files of a model, and how one is made.

The option ``prime`` also takes "background": the file in the cache, and a server that finds none
makes it (`vllm_ext.background`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from proposers.prime import PrimeTable
from vllm_ext.model_files import AUTO, ModelFiles

BACKGROUND = "background"

WIDTH = 8
"""Successors kept of each token."""

DEFAULT_TOKENS = 12288
"""Tokens asked about: those with the lowest ids, the most frequent."""

TABLES = ModelFiles(
    "prime",
    lambda path, identity, model_config: PrimeTable.load(
        path, identity, model_config.get_vocab_size()
    ),
    used=lambda table: f"drafting is primed with {len(table)} tokens",
    without="drafting starts unprimed",
    cached=(AUTO, BACKGROUND),
)


def default_anchor(tokenizer: Any) -> int:
    """A token that may stand before any text: the end of another one, else its own beginning."""
    for name in ("<|endoftext|>", tokenizer.eos_token, tokenizer.bos_token):
        if name is not None:
            found = tokenizer.convert_tokens_to_ids(name)
            if isinstance(found, int) and found != tokenizer.unk_token_id:
                return found
    return 0


def table_of(tokens: Sequence[int], answers: Sequence[Mapping[int, Any]]) -> PrimeTable:
    """The table that vLLM's answers make.

    Args:
        tokens: asked about.
        answers: for each of them, vLLM's ``Logprob`` of the tokens that may follow.
    """
    ids = np.zeros((len(tokens), WIDTH), np.int32)
    probs = np.zeros((len(tokens), WIDTH), np.float32)
    for row, found in enumerate(answers):
        best = sorted(found.items(), key=lambda item: -item[1].logprob)[:WIDTH]
        ids[row, : len(best)] = [token for token, _ in best]
        probs[row, : len(best)] = [np.exp(said.logprob) for _, said in best]
    # Rounding of the target's own arithmetic may carry a sum above 1.
    probs /= np.maximum(probs.sum(axis=1, keepdims=True), 1.0)
    return PrimeTable(np.array(tokens, np.int32), ids, probs)
