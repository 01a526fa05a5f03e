# SPDX-License-Identifier: Apache-2.0
"""``vllm-ext head``: train a draft head on a model's own hidden states, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_ext.cli import engines, environment
from vllm_ext.cli.model_file import destination
from vllm_ext.cli.options import Model


def command(
    model: Model,
    inputs: Annotated[
        list[Path] | None,
        typer.Option(
            "--input",
            help="Text, or .jsonl with prompts ('prompt', 'messages', 'turns') or texts ('text'); "
            "give the option once per file. What your users ask is best.  [default: MODEL writes "
            "its own prompts]",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="Time for everything, about.")] = 30.0,
    tokens: Annotated[
        int, typer.Option(min=1, help="How many tokens the head drafts: the most frequent.")
    ] = 4096,
    width: Annotated[int, typer.Option(min=1, help="Inner size of the head.")] = 576,
    out: Annotated[
        Path | None, typer.Option(help="File to write.  [default: the user's cache]")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="As in vLLM.  [default: the fastest on this machine]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the training.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a head that exists.")] = False,
) -> None:
    """Train a small head that drafts from MODEL's own hidden states.

    MODEL writes and reads for about half of the time. Engines with the method `dyspec` find the
    head in the cache (option `head`).
    """
    engines.require_vllm()
    from vllm_ext.distill.errors import DistillError
    from vllm_ext.head import HEADS
    from vllm_ext.heads.run import make_head
    from vllm_ext.heads.training import HeadSettings

    to = destination(model, HEADS, out, force=force)
    try:
        report = make_head(
            to.folder,
            to.path,
            to.identity,
            inputs or (),
            minutes,
            HeadSettings(tokens=tokens, inner=width, seed=seed),
            dtype or environment.fast_dtype(),
            typer.echo,
        )
    except (DistillError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    for line in shown(report):
        typer.echo(line)
    seconds = sum(report["seconds"].values())
    size = report["parameters"] / 1e6
    typer.echo(f"{to.path}: {size:.1f}M parameters in {seconds:.0f} s; report in {to.path}.json")


def shown(report: dict[str, Any]) -> list[str]:
    """The report's agreement as a Markdown table."""
    lines = [
        "| texts held out | token | places | best draft | best three | the target's own best |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for kind, depths in report["agreement"].items():
        for depth, one in enumerate(depths, start=1):
            lines.append(
                f"| {kind} | {depth} | {one['places']} | {one['first']:.3f} | {one['three']:.3f} "
                f"| {one['own']:.3f} |"
            )
    return lines
