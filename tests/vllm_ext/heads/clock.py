# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
from collections.abc import Callable


def ticking(step: float) -> Callable[[], float]:
    """A clock that advances by `step` with each look at it."""
    now = itertools.count(step, step)
    return lambda: next(now)
