# SPDX-License-Identifier: Apache-2.0
"""An engine and what it started, as one group of processes."""

from __future__ import annotations

import contextlib
import os
import signal


def pause(leader: int) -> None:
    """Halt a group until `resume`, so that it takes no time from another engine.

    vLLM's workers poll for a second after their last step, on cores that all engines share.
    """
    _signal(leader, signal.SIGSTOP)


def resume(leader: int) -> None:
    """Let a group go on."""
    _signal(leader, signal.SIGCONT)


def kill(leader: int) -> None:
    """End a group, halted or not."""
    _signal(leader, signal.SIGKILL)


def _signal(leader: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, number)
