# SPDX-License-Identifier: Apache-2.0
"""What the target says at the rows of a replayed step, those of rejected nodes included.

A recording knows the target's candidates along its own text only. What the target says after a
drafted token that was rejected comes from the model itself: the keys and values of the recorded
text are computed once, and a tree's rows attend to a prefix of them and to their ancestors. Every
answer is kept in a file, because many drafters ask for the same rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

WIDTH = 8
Row = tuple[list[int], list[float]]


class Rows:
    """Candidates by (recording, position, path of drafted tokens).

    Args:
        memo: file of answers from earlier runs; made if it does not exist.
        model: folder or name of the target, asked for what the memo lacks; `None`: such rows are
            not known.
    """

    def __init__(self, memo: Path | None = None, model: str | None = None) -> None:
        self._memo_path = memo
        self._memo: dict[bytes, Row] = {}
        self._model = _Target(model) if model else None
        self.asked = self.known = 0
        if memo is not None and memo.exists():
            stored = np.load(memo, allow_pickle=False)
            self._memo = {
                key.tobytes(): (ids.tolist(), probs.tolist())
                for key, ids, probs in zip(
                    stored["keys"], stored["ids"], stored["probs"], strict=True
                )
            }

    def of(
        self, text: Sequence[int], position: int, paths: Sequence[tuple[int, ...]]
    ) -> list[Row | None]:
        """Candidates after text[:position] + path, for each path of a tree (parents before
        children, none empty).
        """
        prefix = hashlib.blake2b(np.array(text[:position], np.int32).tobytes(), digest_size=8)
        keys = []
        for path in paths:
            key = prefix.copy()
            key.update(np.array(path, np.int32).tobytes())
            keys.append(key.digest())
        if self._model is not None and any(key not in self._memo for key in keys):
            self._memo.update(zip(keys, self._model.rows(text, position, paths), strict=True))
        found = [self._memo.get(key) for key in keys]
        self.asked += len(found)
        self.known += sum(row is not None for row in found)
        return found

    def save(self) -> None:
        """Write the memo."""
        if self._memo_path is not None and self._memo and self._model is not None:
            np.savez(
                self._memo_path,
                keys=np.frombuffer(b"".join(self._memo), np.uint8).reshape(-1, 8),
                ids=np.array([ids for ids, _ in self._memo.values()], np.int32),
                probs=np.array([probs for _, probs in self._memo.values()], np.float32),
            )


class _Target:
    """The model, with the keys and values of one text in its cache."""

    def __init__(self, name: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        self._text: tuple[int, ...] = ()
        self._cache: Any = None

    def rows(
        self, text: Sequence[int], position: int, paths: Sequence[tuple[int, ...]]
    ) -> list[Row]:
        torch = self._torch
        with torch.inference_mode():
            if self._text != tuple(text):
                self._text = tuple(text)
                output = self._model(torch.tensor([text]), use_cache=True, logits_to_keep=1)
                self._cache = output.past_key_values
            length, count = len(text), len(paths)
            mask = torch.full((count, length + count), -torch.inf)
            mask[:, :position] = 0.0
            index = {path: i for i, path in enumerate(paths)}
            for i, path in enumerate(paths):
                for depth in range(1, len(path) + 1):
                    mask[i, length + index[path[:depth]]] = 0.0
            depths = torch.tensor([[position + len(path) - 1 for path in paths]])
            logits = self._model(
                torch.tensor([[path[-1] for path in paths]]),
                attention_mask=mask[None, None],
                position_ids=depths,
                past_key_values=self._cache,
                use_cache=True,
            ).logits[0]
            self._cache.crop(length)
            top = torch.softmax(logits.float(), -1).topk(WIDTH)
        return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
