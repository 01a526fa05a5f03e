# SPDX-License-Identifier: Apache-2.0
"""Whether processes that a test started are still there."""

from __future__ import annotations

import time
from pathlib import Path


def alive(pid: int) -> bool:
    """Whether a process runs: zombies, which only wait to be reaped, do not count."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def ends(pid: int) -> bool:
    """Whether a process is gone soon."""
    for _ in range(100):
        if not alive(pid):
            return True
        time.sleep(0.05)
    return False
