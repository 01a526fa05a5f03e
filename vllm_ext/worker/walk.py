# SPDX-License-Identifier: Apache-2.0
"""The walk: lossless verification of token trees with vLLM's own Sampler.

At each level the Sampler draws one token per live request from the target's logits at the current
node; the token is emitted, and the walk descends if a child of the node holds it.  For a draft tree
fixed before the draw this is exact (sample-then-match: the joint law is the target's, whatever was
drafted), and since every emitted token is one ordinary call of the Sampler, each sampling feature
means what it means without speculation, and a seeded request consumes its generator draw by draw as
it would there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from proposers.tree import TokenTree
from vllm_ext.worker.rowwise import part_of

PLACEHOLDER = -1
"""Marks unused places in the ragged result; vLLM's ``parse_output`` filters them out."""

ROOT = -1

_ROWS_AT_ONCE = 32
"""Rows up to which a greedy batch is sampled in one call, before it is known which are visited: a
row costs less than a level's call of the Sampler. With more rows the levels cost less.
"""


@dataclass(slots=True)
class WalkResult:
    """Outcome of the walk.

    Attributes:
        tokens: per request the emitted tokens, at least one.
        paths: per request the accepted nodes, in order; one fewer than the tokens.
        logprobs: per level, vLLM's ``LogprobsTensors`` of the whole batch, or ``None``.
    """

    tokens: list[list[int]]
    paths: list[list[int]]
    logprobs: list[Any]

    @classmethod
    def plain(cls, tokens: Sequence[Sequence[int]]) -> WalkResult:
        """Of a step without drafts, from what it emitted; its logprobs are with vLLM."""
        return cls([list(emitted) for emitted in tokens], [[] for _ in tokens], [None])

    def padded(self, device: torch.device) -> torch.Tensor:
        """Emitted tokens, int32 [requests, levels], padded with ``PLACEHOLDER``."""
        width = max(len(tokens) for tokens in self.tokens)
        rows = [tokens + [PLACEHOLDER] * (width - len(tokens)) for tokens in self.tokens]
        return torch.tensor(rows, dtype=torch.int32, device=device)


def walk(
    sampler: Callable[..., Any],
    logits: torch.Tensor,
    metadata: Any,
    trees: Sequence[TokenTree],
    starts: Sequence[int],
    histories: Sequence[list[int] | None],
    update_processors: Callable[[Sequence[int]], None],
    undrawn: Sequence[int] = (),
    rowwise: bool = False,
) -> WalkResult:
    """Verify one tree per request.

    Args:
        sampler: vLLM's ``Sampler``.
        logits: [rows, vocab]; per request the root's row, then its nodes'.
        metadata: vLLM's ``SamplingMetadata`` of the batch, one entry per request.
        trees: the tree of each request, possibly empty.
        starts: row of each request's root in ``logits``.
        histories: the live output token lists that penalties and processors read; each path is
            visible in them while walking, and taken off again at the end.
        update_processors: lets logits processors look at the histories between levels; it gets
            the requests that still draw.
        undrawn: requests whose draw is thrown away (unfinished prompts) and whose generator must
            stay where it is.
        rowwise: give the Sampler, below the roots, the requests that still draw instead of the
            whole batch, and a small greedy batch in one call: the same tokens for less work. Only
            where `why_sequential` of `vllm_ext.worker.rowwise` is ``None``.

    Returns:
        The emitted tokens of each request and the nodes that were accepted.
    """
    count = len(trees)
    # Drafts must not be taken for history: the path so far is in `histories`.
    metadata = replace(metadata, spec_token_ids=None)
    if len(logits) == count:  # nothing is drafted: one ordinary step
        drawing = [request for request in range(count) if request not in undrawn]
        output = sampler(
            logits=logits, sampling_metadata=_with_generators(metadata, drawing, count)
        )
        return WalkResult(
            output.sampled_token_ids.tolist(), [[] for _ in trees], [output.logprobs_tensors]
        )
    if rowwise and metadata.all_greedy and len(logits) <= _ROWS_AT_ONCE:
        return _at_once(sampler, logits, metadata, trees, starts)
    children = [tree.children for tree in trees]
    nodes = [ROOT] * count
    tokens: list[list[int]] = [[] for _ in range(count)]
    paths: list[list[int]] = [[] for _ in range(count)]
    logprobs: list[Any] = []
    live = list(range(count))
    sleeping = set(undrawn)
    batch = list(range(count))
    try:
        while live:
            given = live if rowwise and tokens[live[0]] else batch
            rows = [starts[request] + 1 + nodes[request] for request in given]
            level = logits if len(rows) == len(logits) else logits[rows]
            drawing = [request for request in live if request not in sleeping]
            asked = _with_generators(metadata, drawing, count)
            if given is live:
                asked = part_of(asked, live)
            output = sampler(logits=level, sampling_metadata=asked)
            drawn = dict(zip(given, output.sampled_token_ids[:, 0].tolist(), strict=True))
            logprobs.append(output.logprobs_tensors)
            descending = []
            for request in live:
                token = drawn[request]
                tokens[request].append(token)
                child = children[request].get(nodes[request], {}).get(token)
                if child is not None:
                    nodes[request] = child
                    paths[request].append(child)
                    descending.append(request)
                    history = histories[request]
                    if history is not None:
                        history.append(token)
            live = descending
            if live:
                update_processors(live)
    finally:
        for path, history in zip(paths, histories, strict=True):
            if path and history is not None:
                del history[-len(path) :]
    return WalkResult(tokens, paths, logprobs)


def _at_once(
    sampler: Callable[..., Any],
    logits: torch.Tensor,
    metadata: Any,
    trees: Sequence[TokenTree],
    starts: Sequence[int],
) -> WalkResult:
    """The walk where no draw depends on an earlier one: all rows are sampled, some are visited."""
    owners = [request for request, tree in enumerate(trees) for _ in range(1 + len(tree))]
    output = sampler(logits=logits, sampling_metadata=part_of(metadata, owners))
    drawn = output.sampled_token_ids[:, 0].tolist()
    tokens: list[list[int]] = []
    paths: list[list[int]] = []
    for tree, start in zip(trees, starts, strict=True):
        children, path = tree.children, [ROOT]
        while (child := children[path[-1]].get(drawn[start + 1 + path[-1]])) is not None:
            path.append(child)
        tokens.append([drawn[start + 1 + node] for node in path])
        paths.append(path[1:])
    return WalkResult(tokens, paths, [None])


def _with_generators(metadata: Any, drawing: Sequence[int], count: int) -> Any:
    """Drop the generators of requests that are done: their draw at this level is thrown away.

    A generator that advanced here would make a seeded request's output depend on its neighbours'
    depth.
    """
    if not metadata.generators or len(drawing) == count:
        return metadata
    kept = {r: metadata.generators[r] for r in drawing if r in metadata.generators}
    return replace(metadata, generators=kept)


def stack_logprobs(levels: Sequence[Any]) -> Any:
    """Interleave per-level ``LogprobsTensors`` to row ``request * levels + level``.

    Returns:
        One ``LogprobsTensors`` of [requests * levels, ...] tensors, the order in which vLLM's
        ``parse_output`` reads it, or ``None`` if no request wants logprobs.
    """
    first = levels[0]
    if first is None:
        return None
    if len(levels) == 1:
        return first
    columns = [
        torch.stack([getattr(level, name) for level in levels], dim=1).flatten(0, 1)
        for name in ("logprob_token_ids", "logprobs", "selected_token_ranks")
    ]
    return type(first)(*columns)
