# SPDX-License-Identifier: Apache-2.0
"""Priming in the background of a server (option ``prime: "background"``).

While the server has nothing to do, it asks its own engine what follows each frequent token, as
``vllm-ext prime`` does offline. The running drafter learns from these requests as from any other;
the table is written to the cache for the next start.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from pathlib import Path
from typing import Any

from proposers.prime import PrimeTable
from vllm_ext import prime
from vllm_ext.config import is_ours, read_options
from vllm_ext.identity import local_folder
from vllm_ext.model_files import OFF, identity_of

logger = logging.getLogger("vllm.vllm_ext")

_BATCH = 16  # so small that a request which comes meanwhile hardly waits
_LOOK_SECONDS = 0.05


def start(engine: Any) -> asyncio.Task[None] | None:
    """Begin to prime if the engine's options ask for it; call it on the server's event loop.

    Args:
        engine: vLLM's engine client; ``None`` in a server without one.
    """
    if engine is None or not is_ours(engine.vllm_config.speculative_config):
        return None
    _, options = read_options(engine.vllm_config)
    if getattr(options, "prime", OFF) != prime.BACKGROUND:
        return None
    return asyncio.create_task(_prime(engine))


@functools.cache
def warn_if_impossible(option: str, *, server: bool) -> None:
    """Warn, once per process, where the option asks for what nobody here will do.

    Args:
        option: value of ``prime``.
        server: whether the engine is that of a server.
    """
    if option != prime.BACKGROUND:
        return
    if not server:
        logger.warning(
            "vllm-ext: only a server primes itself in the background, this engine does not; make "
            "the table once with `vllm-ext prime --model MODEL`"
        )
    elif "vllm_ext" not in os.environ.get("VLLM_PLUGINS", "").split(","):
        logger.warning(
            "vllm-ext: this server cannot prime itself in the background, because vLLM loads "
            "endpoint plugins only where they are named: set VLLM_PLUGINS=vllm_ext (with the other "
            "plugins that you use, separated by commas), or make the table once with `vllm-ext "
            "prime --model MODEL`"
        )


async def _prime(engine: Any) -> None:
    """Make the table unless it is there; serving goes on whatever happens here."""
    try:
        config = engine.vllm_config
        folder = local_folder(
            config.model_config.model,
            config.model_config.revision,
            config.load_config.download_dir,
        )
        identity = await asyncio.to_thread(identity_of, folder)
        path: Path = prime.TABLES.path(identity)
        if path.exists():
            return
        logger.info("vllm-ext: priming in the background, while nothing else is asked")
        table = await _ask(engine, min(prime.DEFAULT_TOKENS, config.model_config.get_vocab_size()))
        await asyncio.to_thread(table.save, path, identity)
        logger.info("vllm-ext: primed with %d tokens; the table is in %s", len(table), path)
    except Exception:
        logger.exception("vllm-ext: priming in the background failed; serving goes on without it")


async def _ask(engine: Any, count: int) -> PrimeTable:
    """What the engine says after the anchor and each of the first ``count`` tokens."""
    from vllm import SamplingParams

    anchor = prime.default_anchor(engine.get_tokenizer())
    params = SamplingParams(
        max_tokens=1, temperature=0.0, logprobs=prime.WIDTH, detokenize=False, ignore_eos=True
    )

    async def one(token: int) -> Any:
        prompt = {"prompt_token_ids": [anchor, token]}
        async for output in engine.generate(prompt, params, f"vllm-ext-prime-{token}"):
            found = output.outputs[0].logprobs[0]
        return found

    answers: list[Any] = []
    while len(answers) < count:
        if engine.get_num_unfinished_requests():
            await asyncio.sleep(_LOOK_SECONDS)
            continue
        part = range(len(answers), min(len(answers) + _BATCH, count))
        answers += await asyncio.gather(*(one(token) for token in part))
    return prime.table_of(range(count), answers)
