# SPDX-License-Identifier: Apache-2.0
"""What a client sent, shown in an error message that must not grow with it."""

from __future__ import annotations

import reprlib
from typing import Any

_LONGEST = 200  # characters


def shown(value: Any) -> str:
    """A value as Python writes it, in at most 200 characters."""
    try:
        return reprlib.repr(value)[:_LONGEST]
    except ValueError:  # more digits than Python prints
        return "a huge integer"


def named(key: str) -> str:
    """A key as it was given, in at most 200 characters."""
    return key if len(key) <= _LONGEST else f"{key[: _LONGEST - 3]}..."
