# SPDX-License-Identifier: Apache-2.0
"""A logits processor whose effect depends on the output so far."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class AlternatingBan(AdapterLogitsProcessor):
    """With ``extra_args={"ban": n}``: bans tokens congruent to the output length modulo n."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        modulus = (params.extra_args or {}).get("ban")
        if modulus is None:
            return None

        def ban(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            logits[len(output_ids) % modulus :: modulus] = float("-inf")
            return logits

        return ban
