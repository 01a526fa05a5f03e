# SPDX-License-Identifier: Apache-2.0
"""``vllm-ext report``: the result of a benchmark as Markdown, and its plot, without measuring."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_ext.cli import bench_report, engines
from vllm_ext.cli.arms import NONE

HEADERS = (
    "arm",
    "batch",
    "tokens/s",
    "tokens per step",
    "rows per step",
    "TTFT ms",
    "inter-token ms",
    "ratio to plain: median [95%] (by round)",
    "same text",
    "drafting",
)


def command(
    result: Annotated[Path, typer.Argument(help="What `vllm-ext bench --json` wrote.")],
    plot: Annotated[Path | None, typer.Option(help="Also draw the ratios to this image.")] = None,
) -> None:
    """Print the result of a benchmark as Markdown."""
    try:
        found = json.loads(result.read_text(encoding="utf-8"))
        text = markdown(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise typer.BadParameter(
            f"{result} is not a result of `vllm-ext bench --json` ({type(error).__name__}: {error})"
        ) from error
    typer.echo(text, nl=False)
    if plot is not None:
        engines.require_bench_extra("matplotlib")
        bench_report.plot(found["arms"], plot)


def markdown(result: dict[str, Any]) -> str:
    """What was measured on what, one line per arm and batch size, and one per data set and task.

    From three arms on they are compared with each other as well.
    """
    arms = result["arms"]
    return f"{_conditions(result)}\n\n{_overview(arms)}\n{_pairs(arms)}{_parts(arms)}"


def _conditions(result: dict[str, Any]) -> str:
    environment, settings = result["environment"], result["settings"]
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items() if v)
    sets = ", ".join(f"{name} {count}" for name, count in settings["datasets"].items())
    law = f"T={settings['temperature']:g}, seeded" if settings["temperature"] else "greedy"
    lines = [
        f"Machine: {environment['cores']} cores of {environment['cpu']}{_features(environment)}, "
        f"{environment['memory_gib']} GiB; GPU: {environment['gpu'] or 'none'}; load before and "
        f"after {environment['load_average'][0]:.1f}, {environment['load_average_after'][0]:.1f}",
        f"Versions: Python {environment['python']}, {versions}; commit {environment['git_commit']}",
        f"{Path(settings['llm']['model']).name}, {settings['llm']['dtype']}, "
        f"{'compiled' if settings['compiled'] else 'eager'}, "
        f"{'`vllm serve`' if settings['server'] else 'offline'}, {law}, at most "
        f"{settings['max_tokens']} tokens, rounds: {settings['rounds']}"
        f"{', engines started anew for each' if settings.get('engines_per_round') else ''}"
        f"; prompts: {sets}"
        f"{_model_files(settings)}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _features(environment: dict[str, Any]) -> str:
    found = environment.get("cpu_features")  # results made before it was recorded have none
    return f" ({', '.join(found)})" if found else ""


def _model_files(settings: dict[str, Any]) -> str:
    found = settings.get("model_files")  # likewise
    named = ", ".join(f"{sort} {digest[:8]}" for sort, digest in (found or {}).items())
    return f"; in the cache: {named or 'nothing'}" if found is not None else ""


def _overview(arms: dict[str, list[dict[str, Any]]]) -> str:
    return _table(
        HEADERS,
        [
            [
                f"`{arm}`",
                str(e["batch"]),
                f"{e['tokens_per_s']:.1f}",
                f"{e['tokens_per_step']:.2f}",
                f"{e['rows_per_step']:.2f}",
                _milliseconds(e["ttft_ms"]),
                _milliseconds(e["inter_token_ms"]),
                "1" if arm == NONE else _interval(e["ratio"]) + _by_round(e),
                f"{e['identical_to_none']:.0%}",
                "-" if e["drafting_share"] is None else f"{e['drafting_share']:.1%}",
            ]
            for arm, entries in arms.items()
            for e in entries
        ],
    )


def _by_round(entry: dict[str, Any]) -> str:
    """Between rounds lies what more prompts do not average out."""
    medians = [ratio["median"] for ratio in entry["ratio_by_round"]]
    return f" ({', '.join(f'{m:.2f}' for m in medians)})" if len(medians) > 1 else ""


def _pairs(arms: dict[str, list[dict[str, Any]]]) -> str:
    """Each arm but "none" against each other one; nothing for results made before they had it."""
    names = [arm for arm in arms if arm != NONE]
    if len(names) < 2 or "ratio_to" not in arms[names[0]][0]:
        return ""
    rows = [
        [
            f"`{arm}`",
            str(entry["batch"]),
            *("-" if to == arm else _interval(entry["ratio_to"][to]) for to in names),
        ]
        for arm in names
        for entry in arms[arm]
    ]
    headers = ["arm", "batch", *(f"to `{to}`" for to in names)]
    return "\nRatio of two arms, paired: median [95%]\n\n" + _table(headers, rows)


def _parts(arms: dict[str, list[dict[str, Any]]]) -> str:
    cells = [(arm, e) for arm, entries in arms.items() if arm != NONE for e in entries]
    if not cells:
        return ""
    rows = []
    for kind, name in bench_report.parts([e for _, e in cells]):
        found = [e[kind].get(name) for _, e in cells]
        groups = max(part["groups"] for part in found if part)
        shown = [
            f"{part['ratio']['median']:.2f} ({part['tokens_per_step']:.2f})" if part else "-"
            for part in found
        ]
        rows.append([f"**{name}**" if kind == "datasets" else name, str(groups), *shown])
    headers = [f"`{arm}`, batch {e['batch']}" for arm, e in cells]
    return "\nMedian ratio to plain vLLM (tokens per step) by data set and task:\n\n" + _table(
        ["", "groups", *headers], rows
    )


def _interval(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def _milliseconds(quantiles: dict[str, float | None]) -> str:
    value = quantiles["median"]
    return "-" if value is None else f"{value:.1f}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(headers), ["---", *["---:"] * (len(headers) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
