# SPDX-License-Identifier: Apache-2.0
"""What an engine talks to: per-request state, learning from verified steps, trees for the next.

Per engine step, in this order: `observe` the target's rows, `extend` every request by the tokens it
committed, `propose` trees for the next step. Composition: the sources of Token Recycling
(arXiv 2408.08696) and of suffix matching (arXiv 2411.04975) in one online mixture, grown by DySpec
(arXiv 2410.11744), cut by the cost model.
"""

from __future__ import annotations

from collections.abc import Sequence

from proposers.cost_model import CostModel
from proposers.dyspec import DySpecOptions, Growth, grow
from proposers.mixture import Mixture
from proposers.recycling import BigramRecycling, TrigramRecycling
from proposers.source import Source, VerifiedRows
from proposers.suffix import SuffixSource
from proposers.tree import ROOT, TokenTree


class _Request:
    __slots__ = ("chain", "greedy", "growth")

    def __init__(self, greedy: bool, chain: bool) -> None:
        self.greedy = greedy
        self.chain = chain
        self.growth: Growth | None = None


class TreeDrafter:
    """Drafts token trees for a batch of requests, without a draft model.

    Given the same calls it makes the same drafts. Token ids outside the vocabulary (placeholders
    of multimodal inputs) may occur anywhere in the text; they are never drafted.

    Args:
        vocab_size: size of the target's vocabulary.
        options: limits and tunables.
        cost: latency by rows; the engine records every step in it.
        sources: what to mix; default suffix, trigram and bigram recycling.
    """

    def __init__(
        self,
        vocab_size: int,
        options: DySpecOptions,
        cost: CostModel,
        sources: Sequence[Source] | None = None,
    ) -> None:
        if vocab_size < 1:
            raise ValueError(f"TreeDrafter: vocab_size={vocab_size}; it must be at least 1")
        if sources is None:
            sources = (
                SuffixSource(vocab_size),
                TrigramRecycling(options.trigram_capacity, decay=options.decay),
                BigramRecycling(vocab_size, decay=options.decay),
            )
        self.cost = cost
        self._vocab_size = vocab_size
        self._options = options
        self._mixture = Mixture(sources)
        self._requests: dict[str, _Request] = {}

    def start(
        self,
        request: str,
        tokens: Sequence[int],
        *,
        greedy: bool,
        chain: bool = False,
        namespace: int = 0,
    ) -> None:
        """Begin a request, or begin it anew after a preemption.

        Args:
            request: its id.
            tokens: the prompt and whatever it has generated.
            greedy: whether the target takes its most probable token rather than a sample.
            chain: draft only paths without branches.
            namespace: the LoRA adapter's id, 0 without one.
        """
        self._requests[request] = _Request(greedy, chain)
        for source in self._mixture.sources:
            source.start(request, tokens, greedy=greedy, namespace=namespace)

    def observe(self, rows: VerifiedRows) -> None:
        """Learn from the target's distributions of one step."""
        rows = rows.cleaned(self._vocab_size)
        if len(rows):
            for source in self._mixture.sources:
                source.observe(rows)

    def extend(self, request: str, tokens: Sequence[int]) -> None:
        """Append the tokens that a request committed in this step, and learn from them.

        Raises:
            KeyError: if the request was not started.
        """
        record = self._record(request)
        growth, record.growth = record.growth, None
        if growth is not None:
            self._learn(growth, tokens)
        for source in self._mixture.sources:
            source.extend(request, tokens)

    def propose(
        self,
        requests: Sequence[str],
        *,
        max_nodes: Sequence[int] | None = None,
        other_rows: int = 0,
    ) -> list[TokenTree]:
        """Draft for the next step.

        Args:
            requests: ids of the requests that will decode one token each.
            max_nodes: limit per request, on top of the options' (0: no draft).
            other_rows: rows that the step will have besides (prefill).

        Returns:
            One tree per request, empty where no node pays.

        Raises:
            KeyError: if a request was not started.
        """
        if not requests:
            return []
        limits = [self._options.max_nodes] * len(requests)
        if max_nodes is not None:
            limits = [max(0, min(*pair)) for pair in zip(limits, max_nodes, strict=True)]
        growths = []
        for request, limit in zip(requests, limits, strict=True):
            record = self._record(request)
            record.growth = Growth(
                self._mixture.root(request), greedy=record.greedy, chain=record.chain, limit=limit
            )
            growths.append(record.growth)
        return grow(
            growths,
            self._mixture,
            self.cost,
            self._options,
            base_rows=len(requests) + other_rows,
            base_tokens=float(len(requests)),
        )

    def stop(self, request: str) -> None:
        """Forget a request; unknown ones are ignored."""
        self._requests.pop(request, None)
        for source in self._mixture.sources:
            source.stop(request)

    def _learn(self, growth: Growth, tokens: Sequence[int]) -> None:
        node = ROOT
        for token in tokens:
            prediction = growth.predictions.get(node)
            if prediction is None:
                return
            self._mixture.learn(prediction, token)
            child = growth.children.get((node, token))
            if child is None:
                return
            node = child

    def _record(self, request: str) -> _Request:
        try:
            return self._requests[request]
        except KeyError:
            raise KeyError(f"TreeDrafter: request {request!r} is unknown; start it first") from None
