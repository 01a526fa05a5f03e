# SPDX-License-Identifier: Apache-2.0
"""The walk with a ratio rule in place of the Sampler's draw, for drafts that were sampled.

Everything else stays vLLM's own: its Sampler makes the target's law at each level (allowed tokens,
penalties, processors, temperature, top-k, top-p) and reports logprobs of the token. Only its last
step, the draw, is made by the verifications of `proposers.verify_tree` and `proposers.verify_block`
for the requests that have one. The law of the tokens is the target's; which tokens come is not what
the Sampler would have drawn, so a seeded request differs from a run without speculation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import one_hot
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from proposers.tree import TokenTree
from proposers.verify_tree import Verification
from vllm_ext.worker.walk import WalkResult, walk

_GREEDY_BELOW = 1e-5  # vLLM's own limit on the temperature


def ratio_walk(
    sampler: Any,
    logits: torch.Tensor,
    metadata: Any,
    trees: Sequence[TokenTree],
    starts: Sequence[int],
    histories: Sequence[list[int] | None],
    update_processors: Callable[[Sequence[int]], None],
    undrawn: Sequence[int] = (),
    *,
    verifications: Sequence[Verification | None],
) -> WalkResult:
    """Verify one tree per request; see `vllm_ext.worker.walk.walk` for the shared arguments.

    Args:
        sampler: vLLM's ``Sampler``; its draw is replaced during the call.
        logits: [rows, vocab]; per request the root's row, then its nodes'.
        metadata: vLLM's ``SamplingMetadata`` of the batch.
        trees: the scheduled nodes of each request: the first ones of its sampled tree.
        starts: row of each request's root in ``logits``.
        histories: the live output token lists.
        update_processors: called between levels.
        undrawn: requests whose draw is thrown away.
        verifications: one per request, fresh, with as many rows as its tree has nodes; ``None``
            for the Sampler's own draw. Greedy requests have that in any case: for them it keeps the
            same tokens. Block verification learns only at the end which draft tokens it keeps, so
            logprobs do not fit its tokens: give requests that want them the ratio rule, which is a
            `TreeWalk` of the chain with `swor`.

    Returns:
        The emitted tokens of each request and the nodes that were accepted.
    """
    deciding = _without_greedy(verifications, metadata)
    with _drawing(sampler, _Draw(sampler.topk_topp_sampler, deciding, trees)):
        result = walk(
            sampler, logits, metadata, trees, starts, histories, update_processors, undrawn
        )
    for request, verification in enumerate(deciding):
        if verification is not None:
            result.tokens[request] = verification.tokens
            result.paths[request] = verification.path
    return result


class _Draw(torch.nn.Module):
    """Stands where the Sampler draws from processed logits."""

    def __init__(
        self,
        stock: torch.nn.Module,
        verifications: Sequence[Verification | None],
        trees: Sequence[TokenTree],
    ) -> None:
        super().__init__()
        self._stock = stock
        self._verifications = verifications
        self._trees = trees
        self._level = 0

    def forward(
        self,
        logits: torch.Tensor,
        generators: dict[int, torch.Generator],
        k: torch.Tensor | None,
        p: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A token per row, and what the stock draw returns as processed logprobs."""
        open_ones = [
            (request, verification)
            for request, verification in enumerate(self._verifications)
            if verification is not None and verification.node is not None
        ]
        decided = [request for request, _ in open_ones]
        laws = apply_top_k_top_p(  # of copies: it writes into what it is given
            logits[decided],
            None if k is None else k[decided],
            None if p is None else p[decided],
        ).softmax(dim=-1, dtype=torch.float32)
        drawn, processed = self._stock(logits, generators, k, p)
        stuck = laws.isnan().any(dim=1)
        # Without a law (a model that overflowed) the Sampler's token stands, whatever it is.
        laws[stuck] = one_hot(drawn[decided].long()[stuck], laws.shape[1]).to(laws.dtype)
        tokens = []
        for (request, verification), law in zip(open_ones, laws.cpu().numpy(), strict=True):
            verification.feed(law)
            tokens.append(self._token(request, verification, int(law.argmax())))
        drawn[decided] = torch.tensor(tokens, dtype=drawn.dtype, device=drawn.device)
        self._level += 1
        return drawn, processed

    def _token(self, request: int, verification: Verification, likeliest: int) -> int:
        """What leads the walk to the row that is needed next, or ends it."""
        if len(verification.tokens) > self._level:
            return verification.tokens[self._level]
        if verification.node is not None:  # a block, not yet decided: go on along the chain
            return self._trees[request].tokens[verification.node]
        # A block that keeps less than it has read; what it could not go on to is impossible here,
        # so it is not the likeliest token.
        return likeliest


@contextmanager
def _drawing(sampler: Any, draw: _Draw) -> Iterator[None]:
    stock = sampler.topk_topp_sampler
    sampler.topk_topp_sampler = draw
    try:
        yield
    finally:
        sampler.topk_topp_sampler = stock


def _without_greedy(
    verifications: Sequence[Verification | None], metadata: Any
) -> list[Verification | None]:
    if metadata.all_greedy:
        return [None] * len(verifications)
    if metadata.all_random:
        return list(verifications)
    greedy = (metadata.temperature < _GREEDY_BELOW).tolist()
    return [None if g else v for g, v in zip(greedy, verifications, strict=True)]
