# SPDX-License-Identifier: Apache-2.0
"""All requests of one engine: opening sessions, keeping what outlives a batch, handing out records.

Engines never say that a request has finished, only that its row is gone, and a row that is gone may
come back (preemption). A session whose request may come back is kept; one that has ended leaves its
record, for requests that gave an id. Both stores are bounded, oldest out first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from .asap import Asap
from .awrs import Awrs
from .bounded import BoundedConstraint
from .cars import Cars
from .compilation import Spec, compile_constraint
from .constraint import CompiledConstraint, ConstraintError
from .law import SamplingLaw
from .limits import DEFAULT_LIMITS, Bounds, Limits
from .masking import Masking
from .mirostat import Mirostat
from .momentum import Momentum
from .request import ConstraintRequest, MirostatRequest, Request
from .session import Begun, ConstraintSession, MirostatSession, MomentumSession, Record, Session
from .trie_store import TrieStore, trie_key
from .vocabulary import Vocabulary


@dataclass(frozen=True)
class Asked:
    """All of a request that decides its tokens.

    Attributes:
        request: our keys.
        temperature: of the sampling law, 0 for greedy.
        top_k: of the sampling law, 0 for all.
        top_p: of the sampling law.
        seed: the request's own, or ``None``.
        max_tokens: most tokens that the request may generate.
        prompt: token ids; ``None`` for a prompt of embeddings.
    """

    request: Request
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    max_tokens: int
    prompt: tuple[int, ...] | None

    @property
    def named_or_seeded(self) -> bool:
        """Whether requests that ask for the same are one, or draw the same noise anyway."""
        request = self.request
        if self.seed is not None or not isinstance(request, ConstraintRequest):
            return True
        return request.constraint_seed is not None or request.constraint_id is not None


class Sessions:
    """The sessions of one engine.

    Args:
        vocabulary: returns the model's vocabulary; called once, at the first constraint.
        eos_ids: the tokens that end a text.
        model: name of the model, part of a trie's key.
        nonce: what makes unseeded noise of this engine its own; the same on all its ranks.
        limits: bounds on each constraint.
        bounds: bounds on the stores.
    """

    def __init__(
        self,
        vocabulary: Callable[[], Vocabulary],
        eos_ids: Sequence[int],
        model: str,
        nonce: str,
        limits: Limits = DEFAULT_LIMITS,
        bounds: Bounds | None = None,
    ) -> None:
        self._load_vocabulary = vocabulary
        self._vocabulary: Vocabulary | None = None
        self._eos_ids = tuple(eos_ids)
        self._model = model
        self._nonce = nonce
        self._limits = limits
        self._bounds = bounds or Bounds()
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="vllm-ext-constraints")
        self._compiled: OrderedDict[Spec, Future[CompiledConstraint]] = OrderedDict()
        self.tries = TrieStore(max_nodes=self._bounds.trie_nodes)
        self._unseeded = 0
        self._running: dict[int, tuple[Asked, Session]] = {}  # by identity of the session
        self._parked: OrderedDict[int, tuple[Asked, Session]] = OrderedDict()
        self._records: OrderedDict[int, Record] = OrderedDict()
        self._finished = 0

    def open(self, asked: Asked, output: Sequence[int]) -> Session:
        """Return the session of a request that enters the batch with ``output`` so far."""
        session = self._resumed(asked, output) if output else None
        if session is None:
            session = self._new(asked)
            session.longest = asked.max_tokens
        self._running[id(session)] = (asked, session)
        return session

    def close(self, session: Session) -> None:
        """Take a session out of the batch; it has followed its text to the last token."""
        asked, _ = self._running.pop(id(session))
        named = isinstance(session, ConstraintSession) and bool(session.name)
        if not session.over and len(session.tokens) < asked.max_tokens:
            self._parked[id(session)] = (asked, session)
            if len(self._parked) > self._bounds.parked:
                _, (_, session) = self._parked.popitem(last=False)
                named = isinstance(session, ConstraintSession) and bool(session.name)
            else:
                return
        if named:
            assert isinstance(session, ConstraintSession)
            self._finished += 1
            self._records[self._finished] = session.record()
            if len(self._records) > self._bounds.records:
                self._records.popitem(last=False)

    def pop(self, names: Sequence[str]) -> list[Record]:
        """Return the records under ``names``, each once, of running requests as they stand."""
        wanted = set(names)
        done = [key for key, record in self._records.items() if record.id in wanted]
        records = [self._records.pop(key) for key in done]
        for _, session in (*self._parked.values(), *self._running.values()):
            if isinstance(session, ConstraintSession) and session.name in wanted:
                records.append(session.record())
                session.name = ""  # its record is out; leave no second one
        return records

    @property
    def num_held(self) -> int:
        """Sessions and records in memory."""
        return len(self._running) + len(self._parked) + len(self._records)

    def _resumed(self, asked: Asked, output: Sequence[int]) -> Session | None:
        text = list(output)
        same = [
            (len(session.tokens) > len(text), key)
            for key, (known, session) in self._parked.items()
            if session.tokens[: len(text)] == text and known == asked
        ]
        # The engine may have dropped its last tokens. But a longer text can also be that of a
        # request that was stopped, and two requests must not continue with the same noise.
        longer, key = min(same, default=(True, -1))
        if not same or (longer and not asked.named_or_seeded):
            return None
        return self._parked.pop(key)[1]

    def _new(self, asked: Asked) -> Session:
        request = asked.request
        eos = self._eos_ids[0]
        if isinstance(request, MirostatRequest):
            core = Mirostat(
                request.mirostat_version,
                request.mirostat_tau,
                request.mirostat_eta,
                asked.temperature,
            )
            return MirostatSession(core, eos)
        if not isinstance(request, ConstraintRequest):
            return MomentumSession(
                Momentum(request.momentum_alpha, request.momentum_top_k), asked.prompt or (), eos
            )
        future = self._compile(request.spec)
        seed = self._seed(request, asked)
        return ConstraintSession(
            request.constraint_id or "",
            lambda: self._begin(request, asked, future.result(), seed),
            self._eos_ids,
        )

    def _compile(self, spec: Spec) -> Future[CompiledConstraint]:
        future = self._compiled.get(spec)
        if future is None:
            future = self._compiled[spec] = self._compiler.submit(self._compile_now, spec)
        self._compiled.move_to_end(spec)
        while len(self._compiled) > self._bounds.compiled:
            self._compiled.popitem(last=False)
        return future

    def _compile_now(self, spec: Spec) -> CompiledConstraint:
        if self._vocabulary is None:
            self._vocabulary = self._load_vocabulary()
        return compile_constraint(spec, self._vocabulary, self._limits)

    def _seed(self, request: ConstraintRequest, asked: Asked) -> int:
        if request.constraint_seed is not None:
            return request.constraint_seed
        if asked.seed is not None:
            return asked.seed
        self._unseeded += 1
        digest = hashlib.blake2b(f"{self._nonce} {self._unseeded}".encode(), digest_size=8)
        return int.from_bytes(digest.digest(), "little")

    def _begin(
        self, request: ConstraintRequest, asked: Asked, compiled: CompiledConstraint, seed: int
    ) -> Begun:
        law = SamplingLaw(asked.temperature, asked.top_k, asked.top_p)
        if asked.prompt is None:
            raise ConstraintError("constraints need a prompt of tokens, not of embeddings")
        if request.constraint_prefix > len(asked.prompt):
            raise ConstraintError(
                f"constraint_prefix={request.constraint_prefix}: the prompt has only "
                f"{len(asked.prompt)} tokens"
            )
        prefix = asked.prompt[len(asked.prompt) - request.constraint_prefix :]
        constraint = compiled.start()
        sampler: Any  # of four kinds, each with its own kind of state
        if request.constraint_method == "awrs":
            sampler = Awrs(
                law,
                request.constraint_estimator,
                request.constraint_max_rejects,
                request.constraint_max_accepts,
            )
        elif request.constraint_method == "masking":
            sampler = Masking(law)
        else:
            longest = asked.max_tokens
            trie = self.tries.get(trie_key(self._model, asked.prompt, compiled.key, law, longest))
            sampler = (Asap if request.constraint_method == "asap" else Cars)(law, trie)
            constraint = BoundedConstraint(constraint, compiled.vocabulary, longest)
        state = sampler.start(constraint, seed)
        for position, token in enumerate(prefix):
            if not sampler.advance(state, token):
                raise ValueError(
                    f"constraint_prefix={len(prefix)}: token {token} at its position {position} "
                    "violates the constraint"
                )
        return Begun(sampler, state)
