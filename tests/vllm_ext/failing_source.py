# SPDX-License-Identifier: Apache-2.0
"""A source that passes its trial at registration and fails in the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Failing:
    """Drafts nothing, then raises."""

    def __init__(self, context: Any) -> None:
        self._extended = 0

    def start(self, request: str, tokens: Sequence[int], *, greedy: bool, namespace: int) -> None:
        pass

    def extend(self, request: str, tokens: Sequence[int]) -> None:
        self._extended += 1
        if self._extended > 10:
            raise RuntimeError("as intended")

    def stop(self, request: str) -> None:
        pass

    def observe(self, rows: Any) -> None:
        pass

    def root(self, request: str) -> None:
        return None

    def advance(self, state: None, token: int) -> None:
        return None

    def candidates(self, state: None) -> tuple[int, dict[int, float]]:
        return 0, {}

    def prior(self, bucket: int, greedy: bool) -> float:
        return 0.0
