# SPDX-License-Identifier: Apache-2.0
"""A worker that counts how drafts of a model fare, and whose draft model can be broken."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_ext.worker import draft_model, draft_predictor
from vllm_ext.worker.cpu import TreeCPUWorker
from vllm_ext.worker.step import TreeRows

ORIGINALS = {
    "places": draft_model.DraftModel._places,
    "packed": draft_predictor.packed,
    "build": TreeRows.__dict__["build"].__func__,
    "hidden": draft_model.DraftModel._hidden,
}


class _BlindRows:
    """Stands for `TreeRows` in the draft's passes: every row sees all rows before it."""

    @staticmethod
    def build(*args: Any) -> Any:
        rows = ORIGINALS["build"](TreeRows, *args)
        rows.visible = np.tril(np.ones_like(rows.visible))
        return rows


def _levels_moved(positions: int, slots: int) -> Any:
    def places(self: Any, parts: Any, step: Any) -> Any:
        at, where = ORIGINALS["places"](self, parts, step)
        begin = 0
        for part in parts:
            end = begin + len(part.tokens)
            if (part.wanted == len(part.tokens) and part.wanted > 1) or part.tree is not None:
                at[begin:end] += positions
                where[begin:end] = np.roll(where[begin:end], slots)
            begin = end
        return at, where

    return places


def _last_tokens_only(spans: Any, most: int) -> Any:
    return ORIGINALS["packed"]([(end - 1, end) for _, end in spans], most)


def _raising(*args: Any) -> Any:
    raise RuntimeError("broken on purpose")


class DraftWorker(TreeCPUWorker):
    """The real worker, plus what the tests ask it."""

    def watch_drafts(self) -> dict[str, int]:
        """Counts since the last call: trees verified, their nodes and those accepted, branching
        trees, and walks that ended at a node with children, of which none was right.
        """
        runner: Any = self.model_runner
        counts = dict.fromkeys(("trees", "nodes", "accepted", "branching", "inside"), 0)
        seen = runner.__dict__.get("_watched", counts)
        runner._watched = counts
        if "_sample" not in runner.__dict__:
            original = runner._sample

            def _sample(*args: Any) -> Any:
                output = original(*args)
                if runner._step is not None and runner._walked is not None:
                    for tree, path in zip(runner._step.trees, runner._walked.paths, strict=True):
                        if any(tree.probs):  # not one that vLLM made up
                            _count(runner._watched, tree, path)
                return output

            runner._sample = _sample
        return dict(seen)

    def break_draft(self, name: str) -> list[str]:
        """Break one thing (``none`` repairs everything) and return what can be broken."""
        draft_model.DraftModel._places = ORIGINALS["places"]  # type: ignore[method-assign]
        draft_model.TreeRows = TreeRows  # type: ignore[misc]
        draft_predictor.packed = ORIGINALS["packed"]
        runner: Any = self.model_runner
        if name == "positions":
            draft_model.DraftModel._places = _levels_moved(1, 0)  # type: ignore[method-assign]
        elif name == "slots":
            draft_model.DraftModel._places = _levels_moved(0, 1)  # type: ignore[method-assign]
        elif name == "mask":
            draft_model.TreeRows = _BlindRows  # type: ignore[misc,assignment]
        elif name == "catch-up":
            draft_predictor.packed = _last_tokens_only
        elif name == "pass":
            runner._draft_model._hidden = _raising
        elif name != "none":
            raise ValueError(name)
        return ["positions", "slots", "mask", "catch-up"]

    def draft_state(self) -> dict[str, Any]:
        """Whether the draft model is in use, what it holds, and the worker's counters."""
        runner: Any = self.model_runner
        predictor = runner._predictor
        return {
            "used": predictor is not None,
            "vocab": runner._draft_model.drafted_vocab,
            "shared_bytes": runner._draft_model.shared_bytes,
            "texts": len(predictor._texts) if predictor is not None else 0,
            **runner._counters.snapshot(),
        }


def _count(counts: dict[str, int], tree: Any, path: list[int]) -> None:
    counts["trees"] += 1
    counts["nodes"] += len(tree)
    counts["accepted"] += len(path)
    counts["branching"] += not tree.is_chain
    counts["inside"] += bool(tree.children[path[-1] if path else -1])
