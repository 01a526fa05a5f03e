# SPDX-License-Identifier: Apache-2.0
"""``vllm-ext prime``: compute a model's bigram table once, so that drafting starts warm."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_ext.cli import engines, environment
from vllm_ext.cli.model_file import destination
from vllm_ext.cli.options import Model
from vllm_ext.cli.progress import Advance, progress
from vllm_ext.prime import DEFAULT_TOKENS, default_anchor

if TYPE_CHECKING:
    from proposers.prime import PrimeTable

_BATCH = 256


def command(
    model: Model,
    tokens: Annotated[
        int,
        typer.Option(min=1, help="How many tokens: those with the lowest ids, the most frequent."),
    ] = DEFAULT_TOKENS,
    out: Annotated[
        Path | None, typer.Option(help="File to write.  [default: the user's cache]")
    ] = None,
    anchor: Annotated[
        int | None,
        typer.Option(help="Token id before each token.  [default: end or beginning of text]"),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="As in vLLM.  [default: the fastest on this machine]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a table that exists.")] = False,
) -> None:
    """Ask MODEL what follows each frequent token and keep the answers for drafting.

    Engines with our methods find the table in the cache (option `prime`).
    """
    engines.require_vllm()
    from vllm_ext.prime import TABLES

    to = destination(model, TABLES, out, force=force)
    begin = time.monotonic()
    table = compute(
        str(to.folder), tokens=tokens, anchor=anchor, dtype=dtype or environment.fast_dtype()
    )
    table.save(to.path, to.identity)
    typer.echo(f"{to.path}: {len(table)} tokens in {time.monotonic() - begin:.0f} s")


def compute(model: str, *, tokens: int, anchor: int | None, dtype: str) -> PrimeTable:
    """The table of the `tokens` lowest ids, from an engine that lives only for this."""
    # Nothing else runs meanwhile: no core is kept free for a server.
    settings = engines.engine_env(cuda=environment.has_cuda())
    for name, value in {**settings, "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}.items():
        os.environ.setdefault(name, value)
    from vllm import LLM

    options = engines.llm_options(
        model=model, dtype=dtype, max_model_len=64, eager=None, cuda=environment.has_cuda()
    )
    llm = LLM(**options, max_num_seqs=_BATCH, max_num_batched_tokens=2 * _BATCH)
    try:
        vocab = llm.llm_engine.model_config.get_vocab_size()
        first = anchor if anchor is not None else default_anchor(llm.get_tokenizer())
        wanted = range(min(tokens, vocab))
        with progress("priming", total=len(wanted)) as advance:
            return ask(llm, first, wanted, advance)
    finally:
        llm.llm_engine.engine_core.shutdown()


def ask(llm: Any, anchor: int, tokens: Sequence[int], advance: Advance) -> PrimeTable:
    """What the target says after `anchor` and each of `tokens`."""
    from vllm import SamplingParams

    from vllm_ext.prime import WIDTH, table_of

    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=WIDTH, detokenize=False)
    answers = []
    for begin in range(0, len(tokens), 4 * _BATCH):
        part = tokens[begin : begin + 4 * _BATCH]
        requests = [{"prompt_token_ids": [anchor, token]} for token in part]
        for output in llm.generate(requests, params, use_tqdm=False):
            answers.append(output.outputs[0].logprobs[0])
        advance(len(part), "")
    return table_of(tokens, answers)
