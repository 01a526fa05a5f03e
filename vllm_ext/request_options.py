# SPDX-License-Identifier: Apache-2.0
"""What a single request may say about its speculation.

Offline in ``SamplingParams.extra_args``, over HTTP in ``vllm_xargs``: ``{"speculation": false}``
drafts nothing for the request, ``{"max_nodes": 4}`` at most four nodes per step. HTTP has no
booleans there, and clients send strings, so 0, 1, "false", "true" and "4" are understood as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from logits_processors.messages import shown

SWITCH = "speculation"
CAP = "max_nodes"

_WORDS = {"false": False, "off": False, "no": False, "0": False}
_WORDS |= {"true": True, "on": True, "yes": True, "1": True}
_MOST = 1024


class RequestOptionError(ValueError):
    """A request's option is nonsense; the message says what was given and what is allowed.

    Attributes:
        key: of the option.
    """

    def __init__(self, key: str, value: object, allowed: str) -> None:
        super().__init__(f"{key}={shown(value)}; give {allowed}")
        self.key = key


def node_cap(extra_args: Mapping[str, Any] | None) -> int | None:
    """Most nodes per step that a request wants; 0 for none, `None` for no wish.

    Raises:
        RequestOptionError: if an option has a value that it cannot have.
    """
    if not extra_args:
        return None
    cap = _cap(extra_args[CAP]) if CAP in extra_args else None
    if SWITCH in extra_args and not _switch(extra_args[SWITCH]):
        return 0
    return cap


def _switch(value: Any) -> bool:
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in _WORDS:
        return _WORDS[value.strip().lower()]
    raise RequestOptionError(SWITCH, value, "true or false")


def _cap(value: Any) -> int:
    if not isinstance(value, bool) and isinstance(value, (int, float, str)):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = -1.0
        if 0 <= number <= _MOST and number == int(number):
            return int(number)
    raise RequestOptionError(CAP, value, f"a whole number from 0 to {_MOST}")
