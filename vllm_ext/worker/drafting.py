# SPDX-License-Identifier: Apache-2.0
"""Between the runner's view of a batch and the drafter's: rows, contexts, limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from proposers.drafter import TreeDrafter
from proposers.grower import ENDLESS
from proposers.merging import WIDTH
from proposers.source import VerifiedRows
from proposers.tree import TokenTree
from vllm_ext.request_options import node_cap
from vllm_ext.worker.observe import top_candidates
from vllm_ext.worker.step import Step
from vllm_ext.worker.walk import WalkResult

LISTEN_EVERY = 8
"""While nothing is drafted, one of so many steps is learnt from."""


@dataclass(slots=True)
class Candidates:
    """The target's candidates at the rows of one step, taken before sampling changes the logits.

    Attributes:
        ids: int64 [rows, WIDTH].
        probs: float32 [rows, WIDTH].
    """

    ids: np.ndarray[Any, np.dtype[np.int64]]
    probs: np.ndarray[Any, np.dtype[np.float32]]


def candidates(logits: torch.Tensor) -> Candidates:
    """Candidates of each row of ``logits`` [rows, vocab], on the host."""
    ids, probs = top_candidates(logits, WIDTH)
    return Candidates(ids.cpu().numpy(), probs.cpu().numpy())


class Drafting:
    """Owns the drafter of one engine and its per-request state.

    Args:
        drafter: of the configured method.
        trees: whether branching trees can be verified; otherwise chains are drafted.
        later: whether a step's rows are learnt when `catch_up` is called and not at once.
    """

    def __init__(self, drafter: TreeDrafter, trees: bool, *, later: bool = False) -> None:
        self.drafter = drafter
        self.trees: dict[str, TokenTree] = {}
        self._later = later
        self._unobserved: Callable[[], None] | None = None
        self._branching = trees
        self._known: dict[str, int] = {}  # tokens that the drafter has of each request
        self._unlearnt = 0  # steps since rows were learnt last

    def start(self, request_id: str, state: Any) -> None:
        """Begin a request, once its first token is known.

        Args:
            request_id: of the engine.
            state: vLLM's ``CachedRequestState``; its tokens so far become the context.
        """
        params = state.sampling_params
        self._known[request_id] = state.num_tokens
        longest = ENDLESS
        if params.max_tokens is not None:
            longest = state.num_tokens - len(state.output_token_ids) + params.max_tokens
        self.drafter.start(
            request_id,
            [*(state.prompt_token_ids or ()), *state.output_token_ids],
            greedy=params.temperature < 1e-5,
            chain=not self._branching or params.structured_outputs is not None,
            namespace=_adapter(state),
            longest=longest,
        )

    def stop(self, request_id: str) -> None:
        """Forget a request."""
        self.trees.pop(request_id, None)
        if self._known.pop(request_id, None) is not None:
            self.drafter.stop(request_id)

    def listens(self, step: Step) -> bool:
        """Whether to learn from the rows of a step; asked once per step.

        Looking for candidates and keeping them takes time in every step. While nothing is drafted
        that would be the price of being there, so then only some steps are learnt from.
        """
        self._unlearnt += 1
        if not (self.drafter.drafts or not step.plain or self._unlearnt >= LISTEN_EVERY):
            return False
        self._unlearnt = 0
        return True

    def learn(
        self,
        step: Step,
        walked: WalkResult,
        seen: Candidates | None,
        request_ids: Sequence[str],
        states: Mapping[str, Any],
        tokens: Sequence[Sequence[int]],
    ) -> None:
        """Feed one step's outcome to the drafter.

        Args:
            step: what was verified.
            walked: which nodes were accepted.
            seen: the target's candidates at the rows of ``step``, if they were looked for.
            request_ids: the batch.
            states: vLLM's ``CachedRequestState`` by request id, with ``tokens`` already appended.
            tokens: what each request emitted; empty for unfinished prompts.
        """
        if seen is not None:
            self.catch_up()  # what was seen first counts less
            tails = [
                _tail(states[request_id], len(emitted))
                if emitted and states[request_id].prompt_token_ids is not None
                else None
                for request_id, emitted in zip(request_ids, tokens, strict=True)
            ]
            self._unobserved = partial(self._observe, step, walked, seen, tails)
            if not self._later:
                self.catch_up()
        for index, request_id in enumerate(request_ids):
            state = states[request_id]
            if not tokens[index] or state.prompt_token_ids is None:
                continue  # unfinished prompt, or a prompt of embeddings, which has no tokens
            if self._known.get(request_id) == state.num_tokens - len(tokens[index]):
                self._known[request_id] = state.num_tokens
                self.drafter.extend(request_id, tokens[index])
            else:  # new, or its text was changed behind our back
                self.start(request_id, state)

    def catch_up(self) -> None:
        """Learn from rows that `learn` has left for later.

        Drafts need a step's tokens, but hardly its rows: those may wait until the next step
        computes, where that leaves the processor free.
        """
        observe, self._unobserved = self._unobserved, None
        if observe is not None:
            observe()

    def _observe(
        self, step: Step, walked: WalkResult, seen: Candidates, tails: Sequence[_Tail | None]
    ) -> None:
        """The part of `learn` that is about the rows; ``tails`` by request, if it emitted."""
        rejected: list[tuple[int, int, int]] = []  # (before, last, row)
        accepted: list[tuple[int, int, int]] = []
        spaces: dict[int, int] = {}
        for index, tail in enumerate(tails):
            if tail is None:
                continue
            tree, start = step.trees[index], step.starts[index]
            spaces.update(dict.fromkeys(range(start, start + 1 + len(tree)), tail.adapter))
            on_path = set(walked.paths[index])
            accepted.append((tail.before, tail.last, start))
            for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
                context = tail.last if parent < 0 else tree.tokens[parent]
                row = (context, token, start + 1 + node)
                (accepted if node in on_path else rejected).append(row)
        rows = rejected + accepted  # on a shared context the later row counts
        if rows:
            at = np.array([row for _, _, row in rows])
            self.drafter.observe(
                VerifiedRows(
                    np.array([(before, last) for before, last, _ in rows], dtype=np.int64),
                    seen.ids[at],
                    seen.probs[at],
                    np.array([spaces[row] for row in at.tolist()], dtype=np.int64),
                )
            )

    def see(
        self,
        step: Step,
        walked: WalkResult,
        request_ids: Sequence[str],
        limits: Mapping[str, int],
        hidden: torch.Tensor,
    ) -> None:
        """Show the drafter the hidden states that the newest tokens were drawn from.

        Args:
            step: what was verified.
            walked: which nodes were accepted.
            request_ids: the batch.
            limits: most nodes of each request that emitted a token; without any it shows nothing.
            hidden: the target's last hidden states at the rows of `step`, [rows, D].
        """
        if not self.drafter.watches:
            return
        seen, rows = [], []
        for index, request_id in enumerate(request_ids):
            if limits.get(request_id) and request_id in self._known:
                path = walked.paths[index]
                seen.append(request_id)
                rows.append(step.starts[index] + (1 + path[-1] if path else 0))
        if seen:
            self.drafter.see(seen, hidden[torch.tensor(rows, device=hidden.device)].cpu())

    def learn_prompt(self, state: Any, positions: Sequence[int], seen: Candidates) -> None:
        """Learn the candidates at prompt positions.

        Args:
            state: vLLM's ``CachedRequestState``.
            positions: of the prompt, in order.
            seen: the target's candidates there.
        """
        prompt = state.prompt_token_ids or ()
        contexts = [(prompt[p - 1] if p else -1, prompt[p]) for p in positions]
        self.drafter.observe(
            VerifiedRows(
                np.array(contexts, dtype=np.int64),
                seen.ids,
                seen.probs,
                np.full(len(positions), _adapter(state), dtype=np.int64),
            )
        )

    def rests(self, request_ids: Sequence[str], other_rows: int) -> bool:
        """Whether the next step goes without a draft; then `propose` need not be called.

        Args:
            request_ids: as for `propose`.
            other_rows: as for `propose`.
        """
        decoding = sum(request in self._known for request in request_ids)
        if not self.drafter.rests(decoding, other_rows):
            return False
        self.trees = {}
        return True

    def propose(
        self,
        request_ids: Sequence[str],
        limits: Mapping[str, int],
        *,
        other_rows: int,
        most: int,
        asked: bool = False,
    ) -> None:
        """Draft the next step's trees into :attr:`trees`.

        Args:
            request_ids: requests that emitted a token in this step.
            limits: most nodes per request.
            other_rows: rows of unfinished prompts expected in the next step.
            most: nodes over all requests, from `batch_limit`.
            asked: whether the drafter was asked if it `rests`.
        """
        drafted = [r for r in request_ids if r in self._known]
        self.trees = dict(
            zip(
                drafted,
                self.drafter.propose(
                    drafted,
                    max_nodes=[limits[r] for r in drafted],
                    other_rows=other_rows,
                    most=most,
                    asked=asked,
                ),
                strict=True,
            )
        )


def node_limit(state: Any, max_model_len: int, most: int) -> int:
    """Most nodes that a request's next tree may have.

    Bounded by what the request itself asks for, and by the tokens that it may still generate: the
    walk always adds one of its own.

    Args:
        state: vLLM's ``CachedRequestState``.
        max_model_len: of the engine.
        most: nodes per tree.
    """
    params = state.sampling_params
    if getattr(params, "thinking_token_budget", None) is not None:
        return 0  # the budget's state machine reads drafts as a chain
    cap = node_cap(params.extra_args)
    if cap is not None:
        most = min(most, cap)
    left = max_model_len - state.num_tokens
    if params.max_tokens is not None:
        left = min(left, params.max_tokens - len(state.output_token_ids))
    return most if left > 1 else 0


def batch_limit(token_budget: int, decoding: int) -> int:
    """Most nodes of a step, so that drafts never starve prompts.

    The scheduler serves running requests first, and a node costs as much of its budget as a token
    of a prompt. Prompts that wait are unknown to the worker, so half of what the decoding requests
    leave is kept free in every step: a prompt takes at most twice the steps that it takes without
    drafts.

    Args:
        token_budget: tokens that the scheduler may schedule in a step.
        decoding: requests that will decode in it.
    """
    return max(0, (token_budget - decoding) // 2)


def _adapter(state: Any) -> int:
    return state.lora_request.lora_int_id if state.lora_request is not None else 0


class _Tail(NamedTuple):
    """What a request ended with before a step: tokens, -1 where there is none, and its adapter."""

    before: int
    last: int
    adapter: int


def _tail(state: Any, emitted: int) -> _Tail:
    """The tail before the ``emitted`` newest tokens."""
    end = state.num_tokens - emitted

    def token(position: int) -> int:
        return int(state.get_token_id(position)) if position >= 0 else -1

    return _Tail(token(end - 2), token(end - 1), _adapter(state))
