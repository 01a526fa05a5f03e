# SPDX-License-Identifier: Apache-2.0
"""Adaptor to the processor interface of vLLM's Model Runner V2.

Requests live in slots that are never reported free, only used again; texts are on the device; under
speculation a request has one row per draft token. A row of a constraint is one-hot, so vLLM's
rejection sampler never looks beyond the first draft that differs from the chosen token, and neither
does the walk along the drafts. Where a session does not say what it chose, the walk goes on as if
every draft were accepted, and the session goes back afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import torch
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

from .session import Session
from .vllm_batch import Batch, wants_processor


class V2Processor(LogitsProcessor):
    """Constraints, Mirostat and Momentum for Model Runner V2."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self.batch = Batch(vllm_config)
        self._requests = req_states
        self._params: dict[int, Any] = {}  # of our requests, by slot
        self._sessions: dict[int, Session] = {}  # of those that have drawn a token
        self._starts: dict[int, int] = {}  # where their outputs begin

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Take over a slot; whoever had it before is gone."""
        self._leave(req_idx)
        self._params.pop(req_idx, None)
        if not wants_processor(sampling_params):
            return False
        self._params[req_idx] = sampling_params
        return True

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        """Edit the rows ``[rows, V]`` of our requests in place."""
        present = set(ctx.idx_mapping_np.tolist())
        if present.isdisjoint(self._params):
            return logits  # without having waited for the device
        slots = ctx.expanded_idx_mapping.tolist()
        ours = [row for row, slot in enumerate(slots) if slot in self._params]
        offsets = ctx.expanded_local_pos.tolist()
        positions = ctx.pos.tolist()
        fed = ctx.input_ids.tolist()
        roots = {slots[r]: r for r in ours if offsets[r] == 0}
        depth = max(offsets[r] for r in ours)
        on_path = dict.fromkeys(roots, True)
        texts: dict[int, list[int]] = {}
        for offset in range(depth + 1):
            rows: list[tuple[int, Session, Sequence[int]]] = []
            for slot, root in roots.items():
                row = root + offset
                if row >= len(slots) or slots[row] != slot or offsets[row] != offset:
                    continue
                if positions[root] + 1 < int(self._requests.prefill_len.np[slot]):
                    continue  # an unfinished prompt: its draw is thrown away
                if offset == 0:
                    texts[slot] = self._text(slot, positions[root] + 1, present)
                    self._sessions[slot].settled = len(texts[slot])
                else:
                    on_path[slot] = on_path[slot] and self._may_accept(slot, fed[row])
                    texts[slot].append(fed[row])
                if on_path[slot]:
                    rows.append((row, self._sessions[slot], texts[slot]))
            if rows:
                self.batch.edit(logits, rows)
        return logits

    def records(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return and forget the records under ``names``, as plain types."""
        texts = [(session, session.expected()) for session in self._sessions.values()]
        return list(self.batch.records(texts, names))

    def _text(self, slot: int, length: int, present: Set[int]) -> list[int]:
        """Return the output tokens of ``slot``, and open its session if it has none yet."""
        tokens = self._requests.all_token_ids.gpu[slot, :length]
        start = int(self._requests.prompt_len.np[slot])
        output: list[int] = tokens[start:].tolist()
        if slot not in self._sessions:
            if output:  # resumed, perhaps before its old slot is used again
                for absent in self._sessions.keys() - present:
                    self._leave(absent)
            session = self.batch.open(self._params[slot], tokens[:start].tolist(), output)
            assert session is not None
            self._sessions[slot] = session
            self._starts[slot] = start
        return output

    def _may_accept(self, slot: int, draft: int) -> bool:
        session = self._sessions[slot]
        chosen = session.expected()[len(session.tokens) :]
        return draft >= 0 and chosen in ([], [draft])  # vLLM pads drafts with -1

    def _leave(self, slot: int) -> None:
        left = self._sessions.pop(slot, None)
        if left is None:
            return
        start = self._starts.pop(slot)
        text = left.expected()
        if len(text) == len(left.tokens) and not left.over:
            # What the engine drew last is on the device until the slot's next text is written.
            end = int(self._requests.total_len.gpu[slot])
            text = self._requests.all_token_ids.gpu[slot, start:end].tolist()
        self.batch.close(left, text)
