# SPDX-License-Identifier: Apache-2.0
"""Constrained generation with an offline ``vllm.LLM``, and the results of each request."""

from __future__ import annotations

import copy
import math
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from logits_processors.session import Record
from vllm_ext.constraints.records import RPC, merge_replies

MAX_RESTARTS = 10_000

_AT_ONCE = 1024
"""Requests between two looks at the records, of which an engine keeps a bounded number."""


@dataclass(frozen=True)
class Sample:
    """A constrained text.

    Attributes:
        text: as vLLM decoded it.
        token_ids: the emitted tokens, end of text included.
        log_weight: log importance weight; ``-inf`` for a text that is no member of the language.
        record: what the constraint reports about the request that gave the text.
        attempts: requests that were needed (CARS restarts).
    """

    text: str
    token_ids: list[int]
    log_weight: float
    record: Record
    attempts: int = 1


def results(llm: Any, ids: Iterable[str]) -> dict[str, list[Record]]:
    """Return, and make the engine forget, the records of requests that gave a ``constraint_id``.

    Args:
        llm: vLLM's ``LLM``.
        ids: as given in the requests.

    Returns:
        One list per id, with one record per text; empty where nothing is known.
    """
    names = list(ids)
    return merge_replies(names, llm.collective_rpc(RPC, args=(names,)))


def log_weight(record: Record, emitted: int) -> float:
    """Return the log weight of a text of ``emitted`` tokens.

    A text that is not known to be complete is no member of the language and has weight 0.
    """
    if record.state != "complete" or emitted < len(record.token_ids):
        return -math.inf
    return math.fsum(record.log_weights)


def generate(
    llm: Any,
    prompts: Sequence[Any],
    params: Any,
    *,
    max_restarts: int = MAX_RESTARTS,
    use_tqdm: bool = False,
) -> list[Sample]:
    """Generate one constrained text per prompt, submitting again what CARS rejected.

    Args:
        llm: vLLM's ``LLM``.
        prompts: what ``LLM.generate`` takes; repeat a prompt to draw several texts.
        params: one ``SamplingParams`` for all, or one per prompt, with ``constraint_*`` keys in
            ``extra_args`` and ``n = 1``.
        max_restarts: attempts after which a text of CARS is returned as rejected.
        use_tqdm: show vLLM's progress bar.

    Returns:
        Samples in the order of the prompts.

    Raises:
        ValueError: ``n`` above 1, or as many parameters as prompts are needed.
        VLLMValidationError: a bad constraint.
    """
    each = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
    if len(each) != len(prompts):
        raise ValueError(f"{len(each)} sampling parameters for {len(prompts)} prompts")
    if any(p.n != 1 for p in each):
        raise ValueError(
            "n is above 1; repeat the prompt instead, so that each text has its record"
        )
    samples: dict[int, Sample] = {}
    attempts = [0] * len(prompts)
    waiting = list(range(len(prompts)))
    while waiting:
        now, waiting = waiting[:_AT_ONCE], waiting[_AT_ONCE:]
        names = [uuid.uuid4().hex for _ in now]
        asked = [_named(each[i], name, attempts[i]) for i, name in zip(now, names, strict=True)]
        outputs = llm.generate([prompts[i] for i in now], asked, use_tqdm=use_tqdm)
        records = results(llm, names)
        for i, name, output in zip(now, names, outputs, strict=True):
            completion, record = output.outputs[0], _only(records[name])
            attempts[i] += 1
            if record.state == "restart" and attempts[i] <= max_restarts:
                waiting.append(i)
                continue
            tokens = list(completion.token_ids)
            weight = log_weight(record, len(tokens))
            samples[i] = Sample(completion.text, tokens, weight, record, attempts[i])
    return [samples[i] for i in range(len(prompts))]


def _named(params: Any, name: str, rejected: int) -> Any:
    """Return a copy of the parameters with a name and, when tried again, fresh noise."""
    params = copy.copy(params)
    params.extra_args = {**(params.extra_args or {}), "constraint_id": name}
    fresh = rejected << 32
    if params.extra_args.get("constraint_seed") is not None:
        params.extra_args["constraint_seed"] = _int64(params.extra_args["constraint_seed"] + fresh)
    elif params.seed is not None:
        params.seed = _int64(params.seed + fresh)
    return params


def _int64(seed: int) -> int:
    """Wrap a seed into the range that vLLM accepts."""
    return (seed + 2**63) % 2**64 - 2**63


def _only(records: list[Record]) -> Record:
    if len(records) != 1:
        raise RuntimeError(
            f"{len(records)} records for one request: is the engine's processor active? "
            "`vllm-ext doctor` tells"
        )
    return records[0]
