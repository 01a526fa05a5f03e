# SPDX-License-Identifier: Apache-2.0
"""Adaptor to the processor interface of vLLM's Model Runner V1.

Rows move as the batch is condensed, and the interface reports each move. The list of output tokens
is a live reference, so a text is followed by looking at it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from .session import ConstraintSession, Session
from .vllm_batch import Batch

_Row = tuple[Session, list[int]]


class V1Processor(LogitsProcessor):
    """Constraints, Mirostat and Momentum for Model Runner V1.

    Attributes:
        idle: rows whose draw is thrown away, set by an engine that verifies drafts level by level.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.batch = Batch(vllm_config)
        self.idle: Collection[int] = ()
        self._rows: dict[int, _Row] = {}

    @property
    def in_use(self) -> bool:
        """Whether any request of the batch is ours."""
        return bool(self._rows)

    def owns(self, row: int) -> bool:
        """Whether the tokens of a row are chosen here."""
        return row in self._rows

    def is_argmax_invariant(self) -> bool:
        """False: constraints change the most probable token."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Keep up with which request has which row: removals, additions, moves, in this order.

        A request whose row is used again in the same step is not listed as removed. All that leave
        do so before anybody enters, because one may leave and come back in the same step.
        """
        if batch_update is None:
            return
        one_way = MoveDirectionality.UNIDIRECTIONAL
        for row in batch_update.removed:
            self._leave(row)
        for row, *_ in batch_update.added:
            self._leave(row)
        for _, target, direction in batch_update.moved:
            if direction == one_way:
                self._leave(target)
        for row, params, prompt, output in batch_update.added:
            session = self.batch.open(params, prompt, output)
            if session is not None:
                self._rows[row] = (session, output)
        for source, target, direction in batch_update.moved:
            moved, other = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if other is not None and direction != one_way:
                self._rows[source] = other

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Edit the rows ``[requests, V]`` of our requests in place."""
        rows = [
            (row, session, output)
            for row, (session, output) in self._rows.items()
            if row not in self.idle
        ]
        return self.batch.edit(logits, rows) if rows else logits

    def records(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return and forget the records under ``names``, as plain types."""
        return list(self.batch.records(self._rows.values(), names))

    def viable(self, row: int, tokens: Sequence[int], parents: Sequence[int]) -> list[bool] | None:
        """Tell which nodes of a draft tree the constraint of ``row`` allows; ``None`` without one.

        Args:
            row: of the batch.
            tokens: of the nodes, parents first.
            parents: index of each node's parent, -1 for the root.
        """
        session, output = self._rows.get(row, (None, ()))
        if not isinstance(session, ConstraintSession):
            return None
        self.batch.follow(session, output)
        return session.viable(tokens, parents)

    def _leave(self, row: int) -> None:
        left = self._rows.pop(row, None)
        if left is not None:
            self.batch.close(*left)
