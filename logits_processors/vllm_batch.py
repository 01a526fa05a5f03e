# SPDX-License-Identifier: Apache-2.0
"""What the adaptors to vLLM's two processor interfaces share.

Both find out which rows belong to requests of ours; the rest is here: reading sampling parameters,
following texts, editing rows, and never letting an error out, because vLLM's engine dies of one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from .constraint import ConstraintRuntimeError
from .engine_options import read_options
from .request import is_ours, parse_request
from .session import RefusedSession, Session
from .sessions import Asked, Sessions
from .vocabulary import Vocabulary

logger = logging.getLogger("vllm.vllm_ext")

_DEAD = -1e30  # stands for log 0 in a logit: finite, so that the row can still be sampled


def eos_ids(vllm_config: Any) -> tuple[int, ...]:
    """Return the ids that end a text: the tokenizer's, then the generation config's."""
    from vllm.tokenizers import cached_tokenizer_from_config

    model_config = vllm_config.model_config
    tokenizer = cached_tokenizer_from_config(model_config)
    configured = model_config.try_get_generation_config().get("eos_token_id") or []
    ids = [getattr(tokenizer, "eos_token_id", None)]
    ids += configured if isinstance(configured, list) else [configured]
    size = model_config.get_vocab_size()
    return tuple(dict.fromkeys(i for i in ids if i is not None and 0 <= i < size))


def load_vocabulary(vllm_config: Any) -> Vocabulary:
    """Return the bytes of each token of the engine's model."""
    from vllm.tokenizers import cached_tokenizer_from_config

    model_config = vllm_config.model_config
    return Vocabulary.from_tokenizer(
        cached_tokenizer_from_config(model_config),
        model_config.get_vocab_size(),
        eos_ids(vllm_config),
    )


def wants_processor(params: Any) -> bool:
    """Tell whether vLLM's ``SamplingParams`` hold a key of ours."""
    return any(is_ours(key) for key in params.extra_args or ())


class Batch:
    """The requests of ours in one engine, whatever its interface.

    Args:
        vllm_config: of the engine.
    """

    def __init__(self, vllm_config: Any) -> None:
        limits, bounds = read_options(vllm_config.additional_config)
        self._config = vllm_config
        self._limits, self._bounds = limits, bounds
        self._max_model_len = vllm_config.model_config.max_model_len
        self._shows_weights = vllm_config.model_config.logprobs_mode == "processed_logits"
        self._sessions: Sessions | None = None

    def open(
        self, params: Any, prompt: Sequence[int] | None, output: Sequence[int]
    ) -> Session | None:
        """Return a session for a request that uses one of our processors.

        A request that cannot be served gets a session that ends it: giving text without the
        constraint that was asked for is not an option.

        Args:
            params: vLLM's ``SamplingParams``.
            prompt: token ids; ``None`` for a prompt of embeddings.
            output: tokens so far.
        """
        if not wants_processor(params):
            return None
        try:
            request = parse_request(params.extra_args)
            assert request is not None
            longest = max(1, self._max_model_len - len(prompt or ()))
            asked = Asked(
                request,
                float(params.temperature),
                max(0, params.top_k),
                params.top_p,
                params.seed,
                min(params.max_tokens or longest, longest),
                None if prompt is None else tuple(prompt),
            )
            session = self.sessions.open(asked, output)
            session.temperature = asked.temperature or 1.0
            session.stops = params.stop_token_ids or ()
            return session
        except Exception as error:
            stop = params.eos_token_id
            refused = RefusedSession(
                next(iter(params.all_stop_token_ids), 0) if stop is None else stop
            )
            _fail(refused, error)
            return refused

    @property
    def sessions(self) -> Sessions:
        """The engine's sessions, made at the first use."""
        if self._sessions is None:
            self._sessions = Sessions(
                lambda: load_vocabulary(self._config),
                eos_ids(self._config),
                self._config.model_config.model,
                # The ranks of one engine share it, the engines of a data-parallel group do not.
                f"{self._config.instance_id} {self._config.parallel_config.data_parallel_index}",
                self._limits,
                self._bounds,
            )
        return self._sessions

    def close(self, session: Session, output: Sequence[int]) -> None:
        """Take a request out of the batch; ``output`` is its text."""
        self.follow(session, output)
        if not isinstance(session, RefusedSession):
            self.sessions.close(session)

    def edit(
        self, logits: torch.Tensor, rows: Sequence[tuple[int, Session, Sequence[int]]]
    ) -> torch.Tensor:
        """Let sessions choose.

        Args:
            logits: ``[rows, V]``, changed in place.
            rows: (row, its session, the session's text so far), rows of a session in order.
        """
        index = torch.tensor([row for row, _, _ in rows], device=logits.device)
        values = logits[index].float().cpu().numpy()
        forced: list[tuple[int, int, float]] = []
        for (row, session, output), value in zip(rows, values, strict=True):
            token, keep, log_weight = self._choose(session, output, value)
            if keep is not None:
                dropped = torch.from_numpy(~keep).to(logits.device)
                logits[row].masked_fill_(dropped, -math.inf)
                continue
            forced.append((row, token, log_weight * session.temperature))
        if forced:
            at = torch.tensor([row for row, _, _ in forced], device=logits.device)
            tokens = torch.tensor([token for _, token, _ in forced], device=logits.device)
            shown = torch.tensor(
                [max(weight, _DEAD) if self._shows_weights else 0.0 for _, _, weight in forced],
                dtype=logits.dtype,
                device=logits.device,
            )
            logits[at] = -math.inf
            logits[at, tokens] = shown
        return logits

    def records(self, texts: Iterable[tuple[Session, Sequence[int]]], names: Sequence[str]) -> Any:
        """Return and forget the records under ``names``, as plain types.

        Args:
            texts: the requests in the batch, each with its text so far.
            names: their ``constraint_id``s.
        """
        if self._sessions is None:
            return []
        for session, output in texts:
            self.follow(session, output)
        return [vars(record) for record in self._sessions.pop(names)]

    def _choose(
        self, session: Session, output: Sequence[int], logits: np.ndarray[Any, Any]
    ) -> tuple[int, np.ndarray[Any, Any] | None, float]:
        if self.follow(session, output):
            try:
                edit = session.choose(logits)
                return edit.token if edit.token is not None else -1, edit.keep, edit.log_weight
            except Exception as error:
                _fail(session, error)
        return session.eos, None, -math.inf

    @staticmethod
    def follow(session: Session, output: Sequence[int]) -> bool:
        """Let a session look at its text; ``False`` if that ended it with an error."""
        try:
            session.follow(output)
        except Exception as error:
            _fail(session, error)
            return False
        return True


def _fail(session: Session, error: Exception) -> None:
    """End one request instead of the engine."""
    session.fail(f"{type(error).__name__}: {error}")
    expected = isinstance(error, ConstraintRuntimeError | ValueError)
    logger.error("vllm-ext: a constrained request failed: %s", session.error, exc_info=not expected)
