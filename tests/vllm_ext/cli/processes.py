# SPDX-License-Identifier: Apache-2.0
"""Whether processes that a test started are still there."""

from __future__ import annotations

import time
from pathlib import Path


def state_of(pid: int) -> str | None:
    """The letter of a process's state, as in ``ps``; ``None`` if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def alive(pid: int) -> bool:
    """Whether a process runs: zombies, which only wait to be reaped, do not count."""
    return state_of(pid) not in (None, "Z")


def becomes(pid: int, state: str) -> bool:
    """Whether a process is soon in a state."""
    for _ in range(100):
        if state_of(pid) == state:
            return True
        time.sleep(0.05)
    return False


def ends(pid: int) -> bool:
    """Whether a process is gone soon."""
    for _ in range(100):
        if not alive(pid):
            return True
        time.sleep(0.05)
    return False
