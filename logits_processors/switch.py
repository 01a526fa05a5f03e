# SPDX-License-Identifier: Apache-2.0
"""The user's switch that turns off everything of this distribution."""

from __future__ import annotations

import os

VARIABLE = "VLLM_EXT_DISABLE"


def is_disabled() -> bool:
    """Whether the environment says that vLLM is to run as if we were not installed."""
    return os.environ.get(VARIABLE, "0") not in ("", "0")
