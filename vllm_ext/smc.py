# SPDX-License-Identifier: Apache-2.0
"""Sequential Monte Carlo on vLLM: samples of the constrained law, and how probable it is.

A population of texts grows under a constraint. Between rounds it is resampled, so that the compute
goes where the weight is (arXiv 2504.13139); inside a round each particle is an ordinary request
with proper weights (AWRS, arXiv 2504.05410). :mod:`logits_processors.population` holds the method,
this module the two ways to reach an engine: ``sample`` offline and ``sample_async`` over HTTP.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from logits_processors.compilation import Spec
from logits_processors.population import (
    Continuation,
    Particle,
    Plan,
    Population,
    Request,
    drive,
    drive_async,
    population,
)

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from vllm import LLM

__all__ = ["Particle", "Population", "Spec", "sample", "sample_async"]

Method: TypeAlias = Literal["awrs", "masking"]
Potential: TypeAlias = Callable[[str], float]

_RESERVED = ("constraint_method", "constraint_seed", "constraint_id", "constraint_prefix")


def sample(
    llm: LLM,
    prompt: str | Sequence[int],
    constraint: Spec,
    *,
    particles: int = 16,
    ess: float = 0.5,
    tokens_per_round: int = 8,
    max_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    method: Method = "awrs",
    options: Mapping[str, str | int] | None = None,
    seed: int = 0,
    potential: Potential | None = None,
    show_progress: bool | None = None,
) -> Population:
    """Draw a weighted population of constrained texts.

    Args:
        llm: an engine with this package's plugin loaded.
        prompt: text, or token ids (of a chat template, say).
        constraint: what the texts must satisfy, e.g. ``Spec("regex", "[01]{5}")``.
        particles: texts drawn side by side, N; they come in one batch.
        ess: resample when the effective sample size falls below this share of N; 0 never.
        tokens_per_round: tokens between two looks at the weights. Fewer notice a doomed particle
            earlier and cost more rounds.
        max_tokens: longest text in tokens, its end included; a longer one has weight 0.
        temperature, top_k, top_p: the law that is conditioned; 0 and 1.0 keep all tokens.
        method: how a particle grows; both give proper weights.
        options: further request keys, such as ``{"constraint_estimator": "two_loop"}``.
        seed: the same seed gives the same population, as far as the engine's logits repeat.
        potential: log score of a text beyond the constraint: the population then follows
            ``p(text) 1{constraint} exp(potential(text))``. It also steers unfinished texts, where
            ``-inf`` means that no continuation can be saved.
        show_progress: a bar on standard error; by default if that is a terminal.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: a request failed, or its text was cut short by the engine.
    """
    plan = Plan(particles, ess, tokens_per_round, max_tokens, seed)
    law = _Law(constraint, temperature, top_k, top_p, method, options or {})

    from vllm import SamplingParams

    from vllm_ext.constraints import generate

    tokenizer = llm.get_tokenizer()
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def submit(requests: list[Request]) -> list[Continuation]:
        samples = generate(
            llm,
            [{"prompt_token_ids": [*ids, *request.tokens]} for request in requests],
            [
                SamplingParams(
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    max_tokens=request.max_tokens,
                    detokenize=False,
                    extra_args=law.keys(request),
                )
                for request in requests
            ],
        )
        return [
            _continuation(
                request,
                sample.token_ids,
                vars(sample.record),
                lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)),
            )
            for request, sample in zip(requests, samples, strict=True)
        ]

    with _Bar(plan, show_progress) as bar:
        return drive(bar.watch(population(plan, potential)), submit)


async def sample_async(
    client: AsyncOpenAI,
    prompt: str | Sequence[int],
    constraint: Spec,
    *,
    model: str | None = None,
    particles: int = 16,
    ess: float = 0.5,
    tokens_per_round: int = 8,
    max_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    method: Method = "awrs",
    options: Mapping[str, str | int] | None = None,
    seed: int = 0,
    potential: Potential | None = None,
    show_progress: bool | None = None,
) -> Population:
    """Draw a weighted population of constrained texts from a running server.

    Args:
        client: of the server's ``/v1``; the server runs with ``VLLM_PLUGINS=vllm_ext``.
        prompt: see :func:`sample`, as for all arguments not named here.
        constraint: see :func:`sample`.
        model: name of the model; by default the first that the server lists.

    Raises:
        ValueError: an argument out of range.
        openai.APIError: the server refused a request or could not be reached.
        RuntimeError: a request failed, its text was cut short, or the server sent no weights.
    """
    plan = Plan(particles, ess, tokens_per_round, max_tokens, seed)
    law = _Law(constraint, temperature, top_k, top_p, method, options or {})
    server = _Server(client, model or (await client.models.list()).data[0].id)
    ids = await server.encode(prompt) if isinstance(prompt, str) else list(prompt)

    async def answer(request: Request) -> Continuation:
        tokens, record = await server.complete([*ids, *request.tokens], request, law)
        text = await server.decode(_spelled(request, tokens, record))
        return _continuation(request, tokens, record, lambda _: text)

    async def submit(requests: list[Request]) -> list[Continuation]:
        return await asyncio.gather(*map(answer, requests))

    with _Bar(plan, show_progress) as bar:
        return await drive_async(bar.watch(population(plan, potential)), submit)


@dataclass(frozen=True)
class _Law:
    """What all requests of a population share."""

    constraint: Spec
    temperature: float
    top_k: int
    top_p: float
    method: str
    options: Mapping[str, str | int]

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(
                f"method={self.method!r}: SMC needs a weight for every part of a text, which "
                f"{' and '.join(get_args(Method))} give; asap and cars draw whole texts and are "
                "used without SMC"
            )
        if not self.temperature > 0.0:
            raise ValueError(
                f"temperature={self.temperature}: above 0 is allowed; greedy texts are all the same"
            )
        for key in self.options:
            if not key.startswith("constraint_") or key in _RESERVED:
                raise ValueError(
                    f"options[{key!r}]: keys of the constraint's request are allowed, except "
                    f"{', '.join(_RESERVED)}, which SMC sets itself"
                )

    def keys(self, request: Request) -> dict[str, str | int]:
        """The request keys of one particle's next tokens."""
        keys: dict[str, str | int] = {
            **self.options,
            f"constraint_{self.constraint.kind}": self.constraint.source,
            "constraint_method": self.method,
            "constraint_seed": request.seed,
            "constraint_prefix": len(request.tokens),
        }
        if self.constraint.argument:
            keys["constraint_argument"] = self.constraint.argument
        return keys


def _spelled(request: Request, tokens: Sequence[int], record: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens of the particle's text, without the one that ends it."""
    ended = record["state"] in ("complete", "dead_end")
    return (*request.tokens, *(tokens[:-1] if ended else tokens))


def _continuation(
    request: Request,
    tokens: Sequence[int],
    record: Mapping[str, Any],
    decode: Callable[[tuple[int, ...]], str],
) -> Continuation:
    """Read an engine's answer; ``record`` as documented for the constraint's results."""
    if record["state"] == "error":
        raise RuntimeError(f"a particle's request failed: {record['error']}")
    weights = record["log_weights"][: len(tokens)]
    dead = record["state"] == "dead_end"
    if not dead and (len(weights) < len(tokens) or any(not _is_number(w) for w in weights)):
        raise RuntimeError(
            "the engine lost the weights of a particle (too many requests beside it were "
            "preempted); draw the population again"
        )
    return Continuation(
        tuple(tokens),
        -math.inf if dead else math.fsum(weights),
        record["state"] == "complete",
        decode(_spelled(request, tokens, record)),
        record["checks"],
        record["mask_fallbacks"],
    )


def _is_number(weight: float | None) -> bool:
    # None over HTTP, NaN offline.
    return weight is not None and not math.isnan(weight)


class _Server:
    """The four calls to a server."""

    def __init__(self, client: AsyncOpenAI, model: str) -> None:
        self._client, self._model = client, model
        self._root = str(client.base_url).rstrip("/").removesuffix("/v1")

    async def encode(self, prompt: str) -> list[int]:
        answer = await self._post("/tokenize", prompt=prompt)
        return list(answer["tokens"])

    async def decode(self, tokens: Sequence[int]) -> str:
        answer = await self._post("/detokenize", tokens=list(tokens))
        return str(answer["prompt"])

    async def _post(self, path: str, **body: Any) -> dict[str, Any]:
        url = self._root + path
        answer: dict[str, Any] = await self._client.post(
            url, cast_to=dict[str, Any], body={"model": self._model, **body}
        )
        return answer

    async def complete(
        self, prompt: list[int], request: Request, law: _Law
    ) -> tuple[list[int], dict[str, Any]]:
        answer = await self._client.completions.create(
            model=self._model,
            prompt=prompt,
            max_tokens=request.max_tokens,
            temperature=law.temperature,
            top_p=law.top_p,
            extra_body={
                "top_k": law.top_k,
                "return_token_ids": True,
                "vllm_xargs": law.keys(request),
            },
        )
        records = (answer.model_extra or {}).get("constraint")
        if not records:
            raise RuntimeError(
                "the server answered without the field 'constraint', which holds the weights; "
                "start it with VLLM_PLUGINS=vllm_ext"
            )
        return list((answer.choices[0].model_extra or {})["token_ids"]), records[0]


class _Bar:
    """A progress bar over the length of the texts."""

    def __init__(self, plan: Plan, show: bool | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._plan = plan
        self._progress = Progress(
            TextColumn("SMC"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens, {task.fields[growing]} of {task.fields[all]} texts growing"),
            console=Console(stderr=True),
            disable=not (sys.stderr.isatty() if show is None else show),
        )

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def watch(
        self, run: Generator[list[Request], Sequence[Continuation], Population]
    ) -> Generator[list[Request], Sequence[Continuation], Population]:
        """Pass a run through, showing each round."""
        count = self._plan.particles
        task = self._progress.add_task("", total=self._plan.max_tokens, growing=count, all=count)
        requests = next(run)
        while True:
            longest = max(len(request.tokens) for request in requests)
            self._progress.update(task, completed=longest, growing=len(requests))
            try:
                requests = run.send((yield requests))
            except StopIteration as end:
                result: Population = end.value
                self._progress.update(task, completed=self._plan.max_tokens, growing=0)
                return result
