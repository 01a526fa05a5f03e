# SPDX-License-Identifier: Apache-2.0
"""The walk without a host synchronisation per level, for GPUs.

The sequential walk (:mod:`vllm_ext.worker.walk`) reads every level's tokens on the host before it
knows the next level's rows.  Here every row of every tree is sampled once, before it is known which
are visited, and the path is followed by gathers; the host waits once, for the result.

The tokens are those of the sequential walk.  vLLM's sampler returns ``argmax_v p_v / e_v`` with
``e_v`` exponential noise (Gumbel-max), one noise vector per request and draw.  The sequential
walk's draw d is spent at depth d, so all rows of a request at depth d share its d-th noise vector:
the one that is visited then draws the same token.  Each row still gets noise that is independent of
its logits and of the path to it, so the law is the target's with or without seeds.  Generators are
set back to where the sequential walk would have left them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.sampler import Sampler

from proposers.tree import TokenTree
from vllm_ext.worker.walk import WalkResult

_GREEDY_BELOW = 1e-5  # vLLM's own limit on the temperature
_CHUNK_ELEMENTS = 1 << 23  # logits handled at a time: 32 MiB in float32, of what vLLM left free


@dataclass(slots=True)
class _Layout:
    """Where everything is, as int64 device tensors that come over in one copy.

    Attributes:
        rows: [rows] all rows, by depth.
        requests: [rows] the request of each of ``rows``.
        node_rows: [nodes] row of each node.
        parent_rows: [nodes] row of its parent.
        node_tokens: [nodes] its token.
        starts: [requests] row of each root.
        counts: number of rows at each depth, on the host.
        depths: deepest level of each request, on the host.
    """

    rows: torch.Tensor
    requests: torch.Tensor
    node_rows: torch.Tensor
    parent_rows: torch.Tensor
    node_tokens: torch.Tensor
    starts: torch.Tensor
    counts: list[int]
    depths: list[int]

    @classmethod
    def build(
        cls, trees: Sequence[TokenTree], starts: Sequence[int], device: torch.device
    ) -> _Layout:
        depths = [np.array((0, *tree.depths), dtype=np.int64) for tree in trees]
        depth = np.concatenate(depths)
        sizes = [len(d) for d in depths]
        row = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, sizes, strict=True)])
        request = np.repeat(np.arange(len(trees)), sizes)
        order = np.argsort(depth, kind="stable")
        parts: list[NDArray[np.int64]] = [
            row[order],
            request[order],
            row[depth > 0],
            np.concatenate(
                [s + 1 + np.array(t.parents, np.int64) for s, t in zip(starts, trees, strict=True)]
            ),
            np.concatenate([np.array(tree.tokens, np.int64) for tree in trees]),
            np.array(starts, np.int64),
        ]
        packed = torch.from_numpy(np.concatenate(parts))
        if device.type == "cuda":
            packed = packed.pin_memory().to(device, non_blocking=True)
        ends = np.cumsum([len(part) for part in parts]).tolist()
        rows, requests, node_rows, parent_rows, node_tokens, roots = (
            packed[end - len(part) : end] for part, end in zip(parts, ends, strict=True)
        )
        return cls(
            rows,
            requests,
            node_rows,
            parent_rows,
            node_tokens,
            roots,
            counts=np.bincount(depth).tolist(),
            depths=[int(d.max()) for d in depths],
        )


class DeviceWalk:
    """One step's walk, queued on the device when made.

    Args:
        logits: [rows, vocab]; per request the root's row, then its nodes'.
        metadata: vLLM's ``SamplingMetadata`` of the batch; ``why_sequential`` found nothing.
        trees: the tree of each request, possibly empty; siblings hold distinct tokens.
        starts: row of each request's root in ``logits``.

    Attributes:
        path: int64 [2, requests, levels] on the device: emitted tokens, and the rows that they were
            drawn at; unused places hold -1 and the number of rows.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        metadata: Any,
        trees: Sequence[TokenTree],
        starts: Sequence[int],
    ) -> None:
        self._starts = starts
        self._generators: dict[int, torch.Generator] = {}
        self._states: dict[int, list[Any]] = {}
        layout = _Layout.build(trees, starts, logits.device)
        sampled = self._sample(logits, metadata, layout)
        self.path = _follow(sampled, layout)

    def finish(self, path: NDArray[np.int64]) -> WalkResult:
        """Read the result.

        Args:
            path: :attr:`path`, on the host.
        """
        tokens: list[list[int]] = []
        paths: list[list[int]] = []
        for drawn, rows, start in zip(*path, self._starts, strict=True):
            emitted = int((drawn >= 0).sum())
            tokens.append(drawn[:emitted].tolist())
            paths.append((rows[1:emitted] - start - 1).tolist())
        for request, generator in self._generators.items():
            _rewind(generator, self._states[request][len(tokens[request]) - 1])
        return WalkResult(tokens, paths, [None])

    def _sample(self, logits: torch.Tensor, metadata: Any, layout: _Layout) -> torch.Tensor:
        """Draw a token at every row, int64 [rows]."""
        vocab = logits.shape[1]
        sampled = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        chunk = chunk_rows(vocab)
        begin = 0
        for level, count in enumerate(layout.counts):
            noise = None if metadata.all_greedy else self._noise(level, vocab, metadata, layout)
            for first in range(begin, begin + count, chunk):
                part = slice(first, min(first + chunk, begin + count))
                rows, requests = layout.rows[part], layout.requests[part]
                drawn = _draw(logits.index_select(0, rows), metadata, requests, noise)
                sampled.index_copy_(0, rows, drawn)
            begin += count
        return sampled

    def _noise(self, level: int, vocab: int, metadata: Any, layout: _Layout) -> torch.Tensor:
        """The noise of every request's draw at ``level``, float32 [requests, vocab]."""
        count = len(layout.depths)
        noise = torch.empty((count, vocab), dtype=torch.float32, device=layout.rows.device)
        generators = metadata.generators
        if len(generators) != count:
            noise.exponential_()
        for request, generator in generators.items():
            if layout.depths[request] >= level:
                noise[request].exponential_(generator=generator)
                self._generators[request] = generator
                self._states.setdefault(request, []).append(_state(generator))
        return noise


def _draw(
    logits: torch.Tensor, metadata: Any, requests: torch.Tensor, noise: torch.Tensor | None
) -> torch.Tensor:
    """What vLLM's sampler draws at some rows, int64 [rows].

    Args:
        logits: [rows, vocab], a copy.
        metadata: of the batch.
        requests: [rows] the request of each row.
        noise: [requests, vocab], or ``None`` if all requests are greedy.
    """
    logits = logits.to(torch.float32)
    if metadata.allowed_token_ids_mask is not None:
        allowed = metadata.allowed_token_ids_mask.index_select(0, requests)
        logits.masked_fill_(allowed, float("-inf"))
    if noise is None:
        return Sampler.greedy_sample(logits).long()  # type: ignore[no-any-return]
    greedy = None if metadata.all_random else Sampler.greedy_sample(logits).long()
    temperature = metadata.temperature.index_select(0, requests)
    logits = Sampler.apply_temperature(logits, temperature, metadata.all_random)
    top_k, top_p = (
        None if given is None else given.index_select(0, requests)
        for given in (metadata.top_k, metadata.top_p)
    )
    probs = apply_top_k_top_p(logits, top_k, top_p).softmax(dim=-1, dtype=torch.float32)
    drawn: torch.Tensor = probs.div_(_share(noise, requests)).argmax(dim=-1)
    if greedy is None:
        return drawn
    return torch.where(temperature < _GREEDY_BELOW, greedy, drawn)


def _share(noise: torch.Tensor, requests: torch.Tensor) -> torch.Tensor:
    """The noise of each row: that of its request, whichever node of this depth it is."""
    return noise.index_select(0, requests)


def _follow(sampled: torch.Tensor, layout: _Layout) -> torch.Tensor:
    """Descend from each root to the child that holds the sampled token, while there is one.

    Args:
        sampled: int64 [rows], the token drawn at every row.
        layout: of the trees.

    Returns:
        int64 [2, requests, levels]; see :class:`DeviceWalk`.
    """
    end = len(sampled)  # a row past the last: where paths end, and stay
    hit = sampled.index_select(0, layout.parent_rows) == layout.node_tokens
    child = torch.full((end + 1,), end, dtype=torch.int64, device=sampled.device)
    child.scatter_(0, torch.where(hit, layout.parent_rows, end), layout.node_rows)
    child[end] = end
    sampled = torch.cat([sampled, child.new_full((1,), -1)])
    rows = [layout.starts]
    for _ in layout.counts[1:]:
        rows.append(child.index_select(0, rows[-1]))
    stacked = torch.stack(rows, dim=1)
    return torch.stack([sampled[stacked], stacked])


def chunk_rows(vocab: int) -> int:
    """Rows of logits to work on at a time; the copies of more would need memory that is taken."""
    return max(_CHUNK_ELEMENTS // vocab, 1)


def to_host(*tensors: torch.Tensor) -> list[NDArray[Any]]:
    """Copy tensors to the host with one wait for all."""
    if not tensors[0].is_cuda:
        return [tensor.numpy() for tensor in tensors]
    copies = [
        torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
        for t in tensors
    ]
    torch.cuda.current_stream().synchronize()
    return [copy.numpy() for copy in copies]


def _state(generator: torch.Generator) -> Any:
    """Where a generator stands; on a GPU its offset, which the host knows without waiting."""
    return generator.get_offset() if generator.device.type == "cuda" else generator.get_state()


def _rewind(generator: torch.Generator, state: Any) -> None:
    if generator.device.type == "cuda":
        generator.set_offset(state)
    else:
        generator.set_state(state)
