# SPDX-License-Identifier: Apache-2.0
"""A worker whose engine parts can be broken on purpose while it runs.

Each mutation removes one thing that exactness rests on; the tests require that the text changes.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch

from vllm_ext.attention.layout import CacheLayout
from vllm_ext.worker import runner as runner_module
from vllm_ext.worker import step as step_module
from vllm_ext.worker import walk as walk_module
from vllm_ext.worker.cpu import TreeCPUWorker

ORIGINALS = {
    "build": step_module.TreeRows.__dict__["build"],
    "commit": runner_module.commit,
    "generators": walk_module._with_generators,
    "batch_limit": runner_module.batch_limit,
}


def _see_all(cls: Any, *args: Any) -> Any:
    rows = ORIGINALS["build"].__func__(cls, *args)
    rows.visible = np.tril(np.ones_like(rows.visible))
    return rows


def _sequential_positions(cls: Any, *args: Any) -> Any:
    rows = ORIGINALS["build"].__func__(cls, *args)
    rows.depths = np.arange(rows.size)
    return rows


def _one_wrong_slot(step: Any, paths: Any, layers: Any, slot_mappings: Any) -> None:
    shifted = {name: slots.roll(1) for name, slots in slot_mappings.items()}
    ORIGINALS["commit"](step, paths, layers, shifted)


def compiled_kernels() -> set[str]:
    """Numba's kernels of ours and the sorts of arguments for which they are compiled."""
    return {
        f"{name}.{function}{signature}"
        for name, module in list(sys.modules.items())
        if name.startswith(("vllm_ext.", "proposers."))
        for function, value in vars(module).items()
        for signature in getattr(value, "nopython_signatures", ())
    }


class MutantWorker(TreeCPUWorker):
    """The real worker, plus :meth:`mutate` and ways to see what it does."""

    _cut_trees = 0
    _states: list[tuple[list[int], list[float]]]

    def compile_or_warm_up_model(self) -> Any:
        """Stock, and remember what was compiled until then."""
        made = super().compile_or_warm_up_model()
        self._compiled_at_start = compiled_kernels()
        return made

    def compiled_kernels(self) -> tuple[list[str], list[str]]:
        """Those compiled at start, and those compiled while requests waited."""
        return sorted(self._compiled_at_start), sorted(compiled_kernels() - self._compiled_at_start)

    def record_states(self) -> None:
        """Keep what the drafter sees of hidden states, with the text at that time."""
        self._states = []
        runner: Any = self.model_runner
        drafter = runner._drafting.drafter
        original = type(drafter).see

        def see(requests: Any, states: Any) -> None:
            for request, state in zip(requests, states, strict=True):
                held = runner.requests[request]
                known = [*held.prompt_token_ids, *held.output_token_ids]
                self._states.append((known, state.tolist()))
            original(drafter, requests, states)

        drafter.see = see

    def recorded_states(self) -> list[tuple[list[int], list[float]]]:
        """Texts and states so far."""
        return self._states

    def cut_trees(self) -> int:
        """Branching trees so far of which the scheduler kept some nodes, and not all.

        Begins to count when first called.
        """
        if runner_module.build_step is step_module.build_step:
            runner_module.build_step = self._count_cut_trees
        return self._cut_trees

    def _count_cut_trees(
        self, request_ids: Any, scheduled: Any, proposed: Any, *rest: Any
    ) -> step_module.Step:
        step = step_module.build_step(request_ids, scheduled, proposed, *rest)
        for request_id, kept in zip(request_ids, step.trees, strict=True):
            whole = proposed.get(request_id)
            if whole and 0 < len(kept) < len(whole) and not kept.is_chain:
                self._cut_trees += 1
        return step

    def mutate(self, name: str) -> list[str]:
        """Break one thing (``none`` repairs everything) and return what can be broken."""
        runner: Any = self.model_runner
        step_module.TreeRows.build = ORIGINALS["build"]
        runner_module.commit = ORIGINALS["commit"]
        walk_module._with_generators = ORIGINALS["generators"]
        runner.__dict__.pop("_update_processors", None)
        impls = [
            layer.impl
            for layer in runner.compilation_config.static_forward_context.values()
            if hasattr(layer, "impl")
        ]
        for impl in impls:
            impl.layout = impl.__dict__.setdefault("_true_layout", impl.layout)
            impl.kernel = impl.__dict__.setdefault("_true_kernel", impl.kernel)

        if name == "ancestor-mask":
            step_module.TreeRows.build = classmethod(_see_all)  # type: ignore[assignment]
        elif name == "positions":
            step_module.TreeRows.build = classmethod(  # type: ignore[assignment]
                _sequential_positions
            )
        elif name == "no-commit":
            runner_module.commit = lambda *args: None
        elif name == "wrong-slot":
            runner_module.commit = _one_wrong_slot
        elif name == "generators-kept":
            walk_module._with_generators = lambda metadata, drawing, count: metadata
        elif name == "processors-stale":
            runner._update_processors = lambda live: None
        elif name == "cache-layout":
            for impl in impls:
                true = impl.layout
                plain = torch.arange(len(true.keys))
                impl.layout = CacheLayout(true.block_size, true.head_size, plain, true.values)
                impl.kernel = None  # a compiled one knows its packing and asks no layout
        elif name != "none":
            raise ValueError(name)
        return [
            "ancestor-mask",
            "positions",
            "no-commit",
            "wrong-slot",
            "generators-kept",
            "processors-stale",
            "cache-layout",
        ]

    def leave_room_for_prompts(self, leave: bool) -> None:
        """Whether trees keep to their share of a step's tokens, as they do."""
        original = ORIGINALS["batch_limit"]
        runner_module.batch_limit = original if leave else lambda *_: 10**6

    def break_drafting_once(self) -> None:
        """Make the next attempt to draft raise."""
        runner: Any = self.model_runner

        def broken(*step: Any) -> Any:
            del runner._draft
            raise RuntimeError("broken on purpose")

        runner._draft = broken

    def tree_counters(self) -> dict[str, float]:
        """The worker's own counters, as plain numbers."""
        runner: Any = self.model_runner
        return dict(runner._counters.snapshot())

    def draft_from_prompts(self, rows: int) -> None:
        """From now on bigrams alone are drafted, forgotten by this call and learnt from so many
        rows of each prompt as well; below 0 all is as at first.
        """
        runner: Any = self.model_runner
        true = runner.__dict__.setdefault("_true_options", runner._options)
        changes = {"prompt_rows": rows, "sources": ["bigram"]} if rows >= 0 else {}
        runner._options = true.model_copy(update=changes)
        runner._drafting = runner._new_drafting()

    def best_bigrams(self, tokens: list[int]) -> list[int]:
        """What the bigrams hold likeliest after each token, -1 for nothing; see
        :meth:`draft_from_prompts`.
        """
        runner: Any = self.model_runner
        (source,) = runner._drafting.drafter._sources
        best = []
        for token in tokens:
            source.start("probe", [token], greedy=True)
            _, found = source.candidates(source.root("probe"))
            best.append(max(found, key=found.__getitem__, default=-1))
        source.stop("probe")
        return best

    def failed_sources(self) -> list[str]:
        """Names of the sources that are disabled."""
        runner: Any = self.model_runner
        return sorted(runner._resources.failed)
