# SPDX-License-Identifier: Apache-2.0
"""``vllm-ext distill``: a small draft model for a target, in one command."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_ext.cli import engines
from vllm_ext.cli.options import Model, Raw


def command(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder of the draft; made if it is not there.")],
    inputs: Annotated[
        list[Path] | None,
        typer.Option(
            "--input",
            help="Text, or .jsonl with prompts ('prompt', 'messages', 'turns') or texts; give the "
            "option once per file. What your users ask is best.  [default: built-in prompts]",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(
            "--eval",
            help=".jsonl with prompts to evaluate on; they are left out of the training if the "
            "input has them too.  [default: some prompts are put aside]",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            help="Layers of the draft, taken evenly from the target.  [default: an eighth of them]"
        ),
    ] = None,
    early_exit: Annotated[
        bool,
        typer.Option(
            "--early-exit",
            help="Kangaroo: all layers of the draft but the last are the target's lowest and stay "
            "as they are; the last one learns.",
        ),
    ] = False,
    minutes: Annotated[float, typer.Option(min=0.01, help="Time for everything, about.")] = 50.0,
    field: Annotated[str, typer.Option(help="Key of the text in JSON lines.")] = "text",
    raw: Raw = False,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Make a draft from a few layers of MODEL, distilled on what MODEL itself writes.

    The draft is a model folder with MODEL's tokenizer, for `{"model": OUT}` in a speculative
    config. Killed at any moment, the same command goes on. Report: OUT/distill.json.
    """
    if importlib.util.find_spec("transformers") is None:
        typer.echo("transformers is missing (vLLM brings it): pip install transformers", err=True)
        raise typer.Exit(1)
    from vllm_ext.distill.errors import DistillError
    from vllm_ext.distill.run import Job, distill, layers_of
    from vllm_ext.identity import IdentityError, local_folder

    try:
        target = local_folder(engines.model_argument(model))
        job = Job(
            target=target,
            out=out,
            inputs=tuple(inputs or ()),
            held_out=held_out,
            layers=layers
            if layers is not None
            else default_layers(layers_of(target), early_exit=early_exit),
            minutes=minutes,
            field=field,
            raw=raw,
            seed=seed,
            early_exit=early_exit,
        )
        report = distill(job, typer.echo)
    except (DistillError, IdentityError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on", err=True)
        raise typer.Exit(130) from None
    for line in shown(report):
        typer.echo(line)
    typer.echo(f"{out}: a draft of {report['settings']['layers']} layers; see {out}/distill.json")


def default_layers(total: int, *, early_exit: bool = False) -> int:
    """An eighth of the target's layers, at least one that learns: see docs/results/distill.md."""
    return max(2 if early_exit else 1, round(total / 8))


def shown(report: dict[str, Any]) -> list[str]:
    """The report's agreement as a Markdown table, and the costs of a forward pass."""
    rows = (
        ("greedy: same best token", "greedy", "top1_agreement"),
        ("greedy: accepted per step, chain of 4", "greedy", "accepted_per_step"),
        ("T=1: 1 - TV", "t1", "one_minus_tv"),
        ("T=1: accepted per step, chain of 4 (ratio rule)", "t1", "accepted_per_step"),
        ("T=1: the best token is drawn (match rule)", "t1", "matched"),
        ("T=1: KL in nats", "t1", "kl"),
    )
    cost = report["milliseconds_per_token"]
    size = report["parameters"]
    vocab = report["draft_vocab"]
    return [
        "| | before | after [95%] |",
        "|---|---|---|",
        *(
            f"| {title} | {_number(report['before'][part][key], interval=False)} "
            f"| {_number(report['after'][part][key], interval=True)} |"
            for title, part, key in rows
        ),
        "",
        f"drafted are {vocab['tokens']} of {vocab['of']} tokens: {_percent(vocab, 'greedy')} of "
        f"the greedy answers and {_percent(vocab, 't1')} of those at T=1 are written in them",
        f"forward pass of one token in torch: draft {cost['draft_of_its_vocabulary']:.1f} ms, "
        f"with logits of all tokens {cost['draft']:.1f} ms ({size['draft'] / 1e6:.0f}M "
        f"parameters), target {cost['target']:.1f} ms ({size['target'] / 1e6:.0f}M)",
    ]


def _number(found: dict[str, float | None], *, interval: bool) -> str:
    if found["mean"] is None:
        return "answers too short"
    text = f"{found['mean']:.3f}"
    return f"{text} [{found['low']:.3f}, {found['high']:.3f}]" if interval else text


def _percent(vocab: dict[str, Any], part: str) -> str:
    mean = vocab["covered"][part]["mean"]
    return "(answers too short)" if mean is None else f"{100 * mean:.1f}%"
