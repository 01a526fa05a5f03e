# SPDX-License-Identifier: Apache-2.0
"""Draft heads of ``vllm-ext head`` (`proposers.hydra`) as files of a model."""

from __future__ import annotations

from proposers.hydra import HydraHead
from vllm_ext.model_files import ModelFiles

HEADS = ModelFiles(
    "head",
    lambda path, identity, model_config: HydraHead.load(
        path, identity, model_config.get_vocab_size(), model_config.get_hidden_size()
    ),
    used=lambda head: f"drafting with a head of {len(head.tokens)} tokens",
    without="drafting goes on without a head",
)
