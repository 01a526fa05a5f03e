# SPDX-License-Identifier: Apache-2.0
"""A worker whose rule for drawn drafts can be changed, and broken, while it runs."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np

from proposers.verify_swor import swor
from tests.vllm_ext.draft_worker import DraftWorker
from vllm_ext.worker import sampled_drafting as module
from vllm_ext.worker import sampled_runner
from vllm_ext.worker.sampled_drafting import SampledDrafting

ORIGINALS: dict[str, Any] = {
    "swor": swor,
    "growth": SampledDrafting._growth,
    "stream": module._VERIFYING,
    "keeps_text": sampled_runner._keeps_text,
    "verification": SampledDrafting.verification,
}


class _Likeliest:
    """Names the most probable token where dice would draw one."""

    def draw(self, weights: Any) -> int:
        return int(np.argmax(weights))

    def uniform(self) -> float:
        return 0.5


def _named(self: Any, tree: Any, width: int, depth: int, room: int, chance: Any) -> Any:
    return ORIGINALS["growth"](self, tree, width, depth, room, _Likeliest())


def _best_first(p: Any, q: Any, drawn: Any, chance: Any) -> int:
    return swor(p, q, sorted(drawn, key=lambda t: -q.probs[q.place(t)]), chance)


def _another_law(self: Any, *args: Any, **kwargs: Any) -> Any:
    drawn = self._drawn.get(args[0])
    if drawn is not None:
        drawn.tree.laws = {
            node: type(law).of(law.tokens, np.ones_like(law.probs))
            for node, law in drawn.tree.laws.items()
        }
    return ORIGINALS["verification"](self, *args, **kwargs)


class SampledWorker(DraftWorker):
    """The real worker, plus what the tests ask it."""

    def set_rule(self, rule: str, broken: str = "none") -> None:
        """Verify by `rule` from here on, or by swor with trees drawn so; with one thing broken."""
        runner: Any = self.model_runner
        patched: Any = module
        patched.swor = ORIGINALS["swor"]
        SampledDrafting._growth = ORIGINALS["growth"]  # type: ignore[method-assign]
        patched._VERIFYING = ORIGINALS["stream"]
        sampled_runner._keeps_text = ORIGINALS["keeps_text"]
        SampledDrafting.verification = ORIGINALS["verification"]  # type: ignore[method-assign]
        if broken == "named":
            SampledDrafting._growth = _named  # type: ignore[method-assign]
        elif broken == "order":
            patched.swor = _best_first
        elif broken == "stream":
            patched._VERIFYING = module._DRAFTING
        elif broken == "law":
            SampledDrafting.verification = _another_law  # type: ignore[method-assign]
        elif broken == "text":
            sampled_runner._keeps_text = lambda processor, row: False
        elif broken != "none":
            raise ValueError(broken)
        named = {"verify": rule, "draw": "beam"}
        drawn = {"verify": "swor", "draw": rule}
        chosen = named if rule in get_args(module.Rule) else drawn
        runner._options = runner._options.model_copy(update=chosen)
        runner._sampled = runner._new_sampled()

    def teach_draft(self) -> None:
        """The draft model gets the target's weights."""
        runner: Any = self.model_runner
        draft, target = runner._draft_model._model, runner.model
        draft.load_state_dict(target.state_dict())
        for pupil, teacher in zip(draft.modules(), target.modules(), strict=True):
            if hasattr(teacher, "cpu_linear"):  # holds packed weights
                pupil.cpu_linear = teacher.cpu_linear
        runner._predictor.ledger._marks.clear()  # keys and values of the old weights
