# SPDX-License-Identifier: Apache-2.0
"""One request between an engine and a sampler: following its text, choosing its next token.

Engines compute rows whose draw they throw away (chunked prefill, resumed requests) and show the
text at arm's length: all that is certain is the list of emitted tokens. So a session *proposes*
when it sees logits, and *concludes* (a token, a dead end, a restart) only from that list.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from .cars import Cars
from .constraint import Constraint, ConstraintRuntimeError
from .mirostat import Mirostat
from .momentum import Momentum
from .sampler import Draw, Sampler
from .trie_sampler import TrieSampler

PLACEHOLDER = -1
"""What an asynchronous engine shows in place of a token that it has not read back yet."""

_MAX_ERROR = 2000  # characters

Outcome: TypeAlias = Literal["complete", "incomplete", "dead_end", "restart", "error"]


@dataclass(frozen=True)
class Edit:
    """What to do to a row of logits.

    Attributes:
        token: keep this token alone; ``None`` to use ``keep``.
        keep: ``bool[V]`` tokens that stay.
        log_weight: of the forced token.
    """

    token: int | None = None
    keep: NDArray[np.bool_] | None = None
    log_weight: float = 0.0


@dataclass
class Record:
    """What a constrained request came to; plain types, fit for any wire.

    Attributes:
        id: the request's ``constraint_id``, or ``""``.
        token_ids: tokens as drawn. An engine that drew ahead may have emitted fewer.
        log_weights: log importance weight of each drawn token; ``-inf`` where the text died, NaN
            where it is unknown. The weight of a text is the sum over its emitted tokens.
        checks: token checks asked of the constraint.
        mask_fallbacks: steps that needed the full mask.
        state: ``complete`` (ended inside the language), ``incomplete`` (cut off), ``dead_end``
            (nothing allowed could follow), ``restart`` (rejected by CARS: submit it again),
            ``error``.
        error: what went wrong, or ``""``.
    """

    id: str
    token_ids: list[int]
    log_weights: list[float]
    checks: int
    mask_fallbacks: int
    state: Outcome
    error: str = ""


class Session(ABC):
    """The state of one request; ``tokens`` is its text as far as the session has followed it.

    Args:
        eos: the token that ends a request which cannot go on.

    Attributes:
        temperature: what the engine divides its logits by after the edit.
        longest: tokens after which the engine ends the text; ``None`` if not known.
        stops: tokens at which it ends the text.
        settled: tokens that the engine will not take back; ``None`` for all that it showed.
    """

    def __init__(self, eos: int) -> None:
        self.temperature = 1.0
        self.longest: int | None = None
        self.stops: Collection[int] = ()
        self.settled: int | None = None
        self.tokens: list[int] = []
        self.error = ""
        self.eos = eos

    def fail(self, error: str) -> None:
        """End the request with an error, kept short and fit for any wire."""
        self.error = error[:_MAX_ERROR].encode(errors="replace").decode()

    def choose(self, logits: NDArray[np.floating]) -> Edit:
        """Return the edit of the row ``logits`` ``[V]`` that follows ``tokens``.

        Raises:
            Exception: whatever the constraint's engine raises; :meth:`fail` is the answer to it.
        """
        return Edit(self.eos) if self.over or self._cut else self._choose(logits)

    def follow(self, output: Sequence[int]) -> None:
        """Move to the text ``output``, forwards or backwards.

        An engine that speculates draws beyond the end of a text and drops that afterwards; so does
        this.
        """
        tokens = self._without_placeholders(output)
        if self.tokens != tokens[: len(self.tokens)]:
            pairs = zip(self.tokens, tokens, strict=False)
            shorter = min(len(self.tokens), len(tokens))
            same = next((i for i, (mine, new) in enumerate(pairs) if mine != new), shorter)
            self._rewind(same)
            del self.tokens[same:]
        for token in tokens[len(self.tokens) :]:
            if self._cut:
                break
            self._advance(len(self.tokens), token)
            self.tokens.append(token)

    def expected(self) -> list[int]:
        """Return ``tokens`` and, where it is known, the token chosen to follow them."""
        return list(self.tokens)

    @property
    def over(self) -> bool:
        """Whether nothing that follows can change what the session came to."""
        return bool(self.error)

    @property
    def _cut(self) -> bool:
        """Whether the engine ends the text here."""
        return bool(
            len(self.tokens) == self.longest or (self.tokens and self.tokens[-1] in self.stops)
        )

    def _without_placeholders(self, output: Sequence[int]) -> list[int]:
        return list(output)

    @abstractmethod
    def _choose(self, logits: NDArray[np.floating]) -> Edit: ...

    @abstractmethod
    def _advance(self, position: int, token: int) -> None:
        """Take in the token of ``position``; those before it are known."""

    @abstractmethod
    def _rewind(self, length: int) -> None:
        """Go back to the first ``length`` of ``tokens``."""


class RefusedSession(Session):
    """A request that could not be begun and ends at its first token."""

    @override
    def _choose(self, logits: NDArray[np.floating]) -> Edit:
        return Edit(self.eos)

    @override
    def _advance(self, position: int, token: int) -> None:
        """Nothing to learn."""

    @override
    def _rewind(self, length: int) -> None:
        """Nothing to forget."""


@dataclass(frozen=True)
class Begun:
    """A constraint ready to run: a sampler and the request's state in it."""

    sampler: Sampler[Any]
    state: Any


class ConstraintSession(Session):
    """A request under a constraint.

    Args:
        name: the request's ``constraint_id``, or ``""``.
        begin: returns the compiled constraint's sampler and state; called at the first row, so that
            compiling may go on beside the forward pass.
        eos_ids: the tokens that end a text; the first also ends what cannot go on.
    """

    def __init__(self, name: str, begin: Callable[[], Begun], eos_ids: Sequence[int]) -> None:
        super().__init__(eos_ids[0])
        self.name = name
        self._begin = begin
        self._eos_ids = eos_ids
        self._begun: Begun | None = None
        self._draws: list[Draw] = []
        self._followed = 0  # tokens that the sampler knows
        self._ended = False
        self._died: Outcome | None = None

    def record(self) -> Record:
        """Return what is known so far."""
        state: Outcome = "complete" if self._ended else "incomplete"
        return Record(
            self.name,
            [self._drawn(i) for i in range(len(self._draws))],
            [draw.log_weight for draw in self._draws],
            sum(draw.checks for draw in self._draws),
            sum(draw.used_mask for draw in self._draws),
            "error" if self.error else self._died or state,
            self.error,
        )

    def viable(self, tokens: Sequence[int], parents: Sequence[int]) -> list[bool]:
        """Tell which nodes of a draft tree the constraint and the text's length allow.

        Args:
            tokens: of the nodes, parents first.
            parents: index of each node's parent, -1 for the root.
        """
        keep = [False] * len(tokens)
        if self.over or self._begun is None:
            return keep
        constraint = self._begun.state.constraint
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(parents):
            children.setdefault(parent, []).append(node)

        def visit(parent: int, room: int) -> None:
            for node in children.get(parent, ()) if room > 0 else ():
                if self._accepts(constraint, tokens[node]):
                    keep[node] = True
                    visit(node, room - 1)
                    constraint.rollback(1)

        # The last token of a text needs no draft: it is drawn behind those that are accepted.
        longest = len(self.tokens) + len(tokens) + 1 if self.longest is None else self.longest
        visit(-1, longest - len(self.tokens) - 1)
        return keep

    @staticmethod
    def _accepts(constraint: Constraint, token: int) -> bool:
        try:
            return constraint.accept(token)
        except ConstraintRuntimeError:
            return False  # only a guess failed; the text itself may never come here

    @override
    def expected(self) -> list[int]:
        at = len(self.tokens)
        return self.tokens + [self._drawn(i) for i in range(at, min(at + 1, len(self._draws)))]

    @property
    @override
    def over(self) -> bool:
        return bool(self._ended or self._died or self.error)

    @override
    def _choose(self, logits: NDArray[np.floating]) -> Edit:
        begun = self._ready()
        if self.over:
            return Edit(self.eos)
        draw = begun.sampler.step(begun.state, logits)
        position = len(self.tokens)
        self._draws += [_UNKNOWN] * (position - len(self._draws))
        self._draws[position:] = [draw]
        return Edit(self._drawn(position), log_weight=draw.log_weight)

    @override
    def _advance(self, position: int, token: int) -> None:
        if self._begun is None or self.over:
            return
        draw = self._draws[position] if position < len(self._draws) else _UNKNOWN
        if draw is not _UNKNOWN and draw.token is None and token == self.eos:
            self._conclude(draw)
            return
        if not self._begun.sampler.advance(self._begun.state, token):
            self.fail(
                f"token {token} was emitted at position {position} although the constraint forbids "
                "it: another feature of this request overrides the constraint"
            )
            return
        self._followed += 1
        self._ended = token in self._eos_ids

    @override
    def _rewind(self, length: int) -> None:
        if self._begun is not None and length < self._followed and not self._died:
            self._begun.sampler.rewind(self._begun.state, self._followed - length)
            self._followed = length
            self._ended = False

    @override
    def _without_placeholders(self, output: Sequence[int]) -> list[int]:
        known = len(self._draws)
        return [
            self._drawn(i) if token == PLACEHOLDER and i < known else token
            for i, token in enumerate(output)
        ]

    def _drawn(self, position: int) -> int:
        token = self._draws[position].token
        return self.eos if token is None else token

    def _ready(self) -> Begun:
        if self._begun is None:
            self._begun = self._begin()
            for position, token in enumerate(self.tokens):  # resumed, and its session was lost
                self._advance(position, token)
        return self._begun

    def _conclude(self, draw: Draw) -> None:
        """Learn that the text ended here without being a member."""
        assert self._begun is not None
        sampler, state = self._begun.sampler, self._begun.state
        if isinstance(sampler, Cars) and draw.restart:
            sampler.restart(state)
        elif isinstance(sampler, TrieSampler):
            sampler.fail(state)
        self._died = "restart" if draw.restart else "dead_end"


class MirostatSession(Session):
    """A request whose surprise is controlled; the engine draws from what is kept."""

    def __init__(self, core: Mirostat, eos: int) -> None:
        super().__init__(eos)
        self._core = core
        self._caps = [core.initial_mu]  # before each token
        self._surprise: dict[int, NDArray[np.float64]] = {}  # of each token, by position

    @override
    def _choose(self, logits: NDArray[np.floating]) -> Edit:
        here = len(self.tokens)
        settled = here if self.settled is None else self.settled
        for position in [p for p in self._surprise if p < settled]:
            del self._surprise[position]  # as large as the vocabulary
        self._surprise[here] = self._core.surprise(logits)
        return Edit(keep=self._core.keep(self._surprise[here], self._caps[-1]))

    @override
    def _advance(self, position: int, token: int) -> None:
        cap = self._caps[-1]
        if position in self._surprise:
            cap = self._core.update(cap, float(self._surprise[position][token]))
        self._caps.append(cap)

    @override
    def _rewind(self, length: int) -> None:
        del self._caps[length + 1 :]
        for position in [p for p in self._surprise if p > length]:
            del self._surprise[position]


class MomentumSession(Session):
    """A request decoded greedily with resistance to repetition."""

    def __init__(self, core: Momentum, prompt: Sequence[int], eos: int) -> None:
        super().__init__(eos)
        self._core = core
        self._prompt = list(prompt)

    @override
    def _choose(self, logits: NDArray[np.floating]) -> Edit:
        return Edit(self._core.choose(logits, self._prompt + self.tokens))

    @override
    def _advance(self, position: int, token: int) -> None:
        """Nothing to learn: the rule reads the history afresh."""

    @override
    def _rewind(self, length: int) -> None:
        """Nothing to forget."""


_UNKNOWN = Draw(None, math.nan)
