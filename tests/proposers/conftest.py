# SPDX-License-Identifier: Apache-2.0
"""A source whose predictions are a table, so that a test knows what the mixture must say."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from proposers import Candidates, VerifiedRows


class TableSource:
    """Answers by the last token alone, with fixed odds; tokens that are not listed: nothing."""

    def __init__(self, table: dict[int, Candidates], odds: float = 1e9) -> None:
        self.table = table
        self.odds = odds
        self.last: dict[str, int] = {}
        self.observed = 0

    def start(
        self, request: str, tokens: Sequence[int], *, greedy: bool, namespace: int = 0
    ) -> None:
        self.last[request] = tokens[-1]

    def extend(self, request: str, tokens: Sequence[int]) -> None:
        if tokens:
            self.last[request] = tokens[-1]

    def stop(self, request: str) -> None:
        self.last.pop(request, None)

    def observe(self, rows: VerifiedRows) -> None:
        self.observed += len(rows)

    def root(self, request: str) -> int:
        return self.last[request]

    def advance(self, state: int, token: int) -> int:
        return token

    def candidates(self, state: int) -> tuple[int, Candidates]:
        return (1 if state in self.table else 0), self.table.get(state, {})

    def prior(self, bucket: int, greedy: bool) -> float:
        return self.odds if bucket else 0.0


@pytest.fixture(scope="session")
def table_source() -> type[TableSource]:
    return TableSource
