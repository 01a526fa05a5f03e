# SPDX-License-Identifier: Apache-2.0
"""What an engine talks to: per-request state, learning from verified steps, trees for the next.

Per engine step, in this order: `observe` the target's rows, `extend` every request by the tokens it
committed, `propose` trees for the next step. How trees grow, and from which sources, is the
grower's part; by default the sources of Token Recycling (arXiv 2408.08696) and of suffix matching
(arXiv 2411.04975) in one online mixture, grown by DySpec (arXiv 2410.11744), cut by the cost model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from proposers.cost_model import CostModel
from proposers.dyspec import DySpec, DySpecOptions
from proposers.gate import Gate
from proposers.grower import ENDLESS, Draftee, Grower
from proposers.mixture import Mixture
from proposers.recycling import BigramRecycling, TrigramRecycling
from proposers.source import Source, StateSource, VerifiedRows
from proposers.suffix import SuffixSource
from proposers.tree import TokenTree

if TYPE_CHECKING:
    from torch import Tensor


class _Request:
    __slots__ = ("chain", "greedy", "length", "longest", "unread")

    def __init__(self, greedy: bool, chain: bool, length: int, longest: int) -> None:
        self.greedy = greedy
        self.chain = chain
        self.length = length
        self.longest = longest
        self.unread: list[int] = []  # committed tokens that the sources do not know of yet


class TreeDrafter:
    """Drafts token trees for a batch of requests, without a draft model.

    Given the same calls it makes the same drafts. Token ids outside the vocabulary (placeholders
    of multimodal inputs) may occur anywhere in the text; they are never drafted.

    Args:
        vocab_size: size of the target's vocabulary.
        options: limits and tunables.
        cost: latency by rows and context; the engine records every step in it.
        sources: what DySpec mixes; default suffix, trigram and bigram recycling.
        grower: grows the trees in place of DySpec and brings its own sources.
        gate: stops drafting while it does not pay; `None` drafts in every step.

    Raises:
        ValueError: for a vocabulary of no tokens, or for sources beside a grower.
    """

    def __init__(
        self,
        vocab_size: int,
        options: DySpecOptions,
        cost: CostModel,
        sources: Sequence[Source] | None = None,
        grower: Grower | None = None,
        gate: Gate | None = None,
    ) -> None:
        if vocab_size < 1:
            raise ValueError(f"TreeDrafter: vocab_size={vocab_size}; it must be at least 1")
        if sources is not None and grower is not None:
            raise ValueError("TreeDrafter: give sources or a grower, which has its own")
        if sources is None:
            sources = (
                SuffixSource(vocab_size),
                TrigramRecycling(options.trigram_capacity, decay=options.decay),
                BigramRecycling(vocab_size, decay=options.decay),
            )
        self.cost = cost
        self._vocab_size = vocab_size
        self._max_nodes = options.max_nodes
        self._grower: Grower = grower or DySpec(Mixture(sources), options)
        self._sources = self._grower.sources
        self.gate = gate
        # Beside a prompt drafts cost next to nothing, and the next step is another question.
        self._gate_beside_prompts = None if gate is None else Gate()
        self._wanted = True  # by any request of the latest batch
        self._requests: dict[str, _Request] = {}
        self._states: tuple[Sequence[str], Tensor] | None = None

    def start(
        self,
        request: str,
        tokens: Sequence[int],
        *,
        greedy: bool,
        chain: bool = False,
        namespace: int = 0,
        longest: int = ENDLESS,
    ) -> None:
        """Begin a request, or begin it anew after a preemption.

        Args:
            request: its id.
            tokens: the prompt and whatever it has generated.
            greedy: whether the target takes its most probable token rather than a sample.
            chain: draft only paths without branches.
            namespace: the LoRA adapter's id, 0 without one.
            longest: tokens that it can have at most, prompt included.
        """
        if request in self._requests:
            self._read(request)
        self._requests[request] = _Request(greedy, chain, len(tokens), longest)
        self._grower.stop(request)
        for source in self._sources:
            source.start(request, tokens, greedy=greedy, namespace=namespace)

    def observe(self, rows: VerifiedRows) -> None:
        """Learn from the target's distributions of one step."""
        rows = rows.cleaned(self._vocab_size)
        if len(rows):
            for source in self._sources:
                source.observe(rows)

    def extend(self, request: str, tokens: Sequence[int]) -> None:
        """Append the tokens that a request committed in this step.

        They are learnt from when somebody asks: while nothing is drafted, a step costs nothing.

        Raises:
            KeyError: if the request was not started.
        """
        record = self._record(request)
        record.length += len(tokens)
        record.unread.extend(tokens)

    def _read(self, request: str) -> None:
        """Learn from what a request has committed since this was called last."""
        record = self._record(request)
        tokens, record.unread = record.unread, []
        if tokens:
            self._grower.learn(request, tokens)
            for source in self._sources:
                source.extend(request, tokens)

    @property
    def drafts(self) -> bool:
        """Whether drafts pay at present and are wanted; else all learning is for later."""
        return self._wanted and (self.gate is None or self.gate.is_open)

    @property
    def watches(self) -> bool:
        """Whether a source wants the target's hidden states."""
        return any(_watches(source) for source in self._sources)

    def see(self, requests: Sequence[str], states: Tensor) -> None:
        """Hand on the target's hidden states, see `StateSource.see`; after `extend`.

        Sources get them with the next draft, if none come after them.
        """
        self._states = requests, states

    def rests(self, requests: int, other_rows: int = 0) -> bool:
        """Whether the next step goes without a draft, because lately drafts have not paid.

        To be asked once per step: by `propose`, or before it, to leave out all that leads up to it.

        Args:
            requests: that will decode one token each.
            other_rows: rows that the step will have besides (prefill).
        """
        gate = self._gate_beside_prompts if other_rows else self.gate
        if gate is None or not requests:
            return False
        base_rows = requests + other_rows
        measured = self.cost.steps(base_rows) if gate.is_open else None
        return not gate.wants_draft(base_rows, measured)

    def propose(
        self,
        requests: Sequence[str],
        *,
        max_nodes: Sequence[int] | None = None,
        other_rows: int = 0,
        most: int | None = None,
        asked: bool = False,
    ) -> list[TokenTree]:
        """Draft for the next step, unless it `rests`.

        Args:
            requests: ids of the requests that will decode one token each.
            max_nodes: limit per request, on top of the options' (0: no draft).
            other_rows: rows that the step will have besides (prefill).
            most: nodes over all requests that the step has room for.
            asked: whether `rests` was asked about this step, and said no.

        Returns:
            One tree per request, empty where no node pays.

        Raises:
            KeyError: if a request was not started.
        """
        if not requests:
            return []
        if not asked and self.rests(len(requests), other_rows):
            return [TokenTree.EMPTY] * len(requests)
        base_rows, base_tokens = len(requests) + other_rows, float(len(requests))
        gate = self._gate_beside_prompts if other_rows else self.gate
        limits = [self._max_nodes] * len(requests)
        if max_nodes is not None:
            limits = [max(0, min(*pair)) for pair in zip(limits, max_nodes, strict=True)]
        if most is not None:
            limits = [min(limit, most) for limit in limits]
        records = [self._record(request) for request in requests]
        self._wanted = any(limits)
        if not self._wanted:
            return [TokenTree.EMPTY] * len(requests)
        for request in requests:
            self._read(request)
        self._show_states()
        draftees = [
            Draftee(request, record.greedy, record.chain, limit, record.longest - record.length)
            for request, record, limit in zip(requests, records, limits, strict=True)
        ]
        cost = self.cost.in_context(base_rows, [record.length for record in records])
        trees = self._grower.grow(
            draftees, cost, base_rows=base_rows, base_tokens=base_tokens, most=most
        )
        if gate is None:
            return trees
        gain = cost.gain(base_rows, trees, self._grower.spent) if any(trees) else 0.0
        return trees if gate.decide(gain, base_rows) else [TokenTree.EMPTY] * len(requests)

    def stop(self, request: str) -> None:
        """Forget a request; unknown ones are ignored."""
        if request in self._requests:
            self._read(request)  # some sources keep what other requests may use
            del self._requests[request]
        if self._states is not None and request in self._states[0]:
            self._states = None
        self._grower.stop(request)
        for source in self._sources:
            source.stop(request)

    def _show_states(self) -> None:
        if self._states is None:
            return
        requests, states = self._states
        self._states = None
        for source in self._sources:
            if _watches(source):
                cast(StateSource, source).see(requests, states)

    def _record(self, request: str) -> _Request:
        try:
            return self._requests[request]
        except KeyError:
            raise KeyError(f"TreeDrafter: request {request!r} is unknown; start it first") from None


def _watches(source: Source) -> bool:
    return bool(getattr(source, "watches", hasattr(source, "see")))
