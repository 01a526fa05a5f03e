# SPDX-License-Identifier: Apache-2.0
"""The toy's numbers as Markdown tables and as a picture.

python examples/constraints/report.py toy.json --markdown toy.md --plot toy.png
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

STYLES = {
    "masking": ("tab:red", "--"),
    "masking, weighted": ("tab:red", "-"),
    "AWRS without its weights": ("tab:orange", "--"),
    "AWRS": ("tab:orange", "-"),
    "ASAp": ("tab:green", "--"),
    "ASAp, weighted": ("tab:green", "-"),
    "CARS": ("tab:blue", "-"),
    "AWRS-SMC, 16 particles": ("tab:purple", "-"),
}
SHOWN_COUNTS = 5
SHOWN_TEXTS = 6


def page(result: dict[str, Any]) -> str:
    """Return all of a result as Markdown."""
    environment, settings = result["environment"], result["settings"]
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items() if v)
    parts = [
        "# Sampling a finite language",
        "",
        f"{settings['model']}, {settings['dtype']}, temperature {settings['temperature']}, "
        f"{'chat template' if settings['chat'] else 'plain prompt'}, seed {settings['seed']}; "
        f"{environment['cpu']}, {versions}; commit {environment['git_commit']}.",
        "",
        f"`{' '.join(environment['command'])}`",
        "",
        *map(table, result["studies"]),
    ]
    if "engine" in result:
        parts.append(engine_table(result["engine"]))
    return "\n".join(parts)


def table(study: dict[str, Any]) -> str:
    """Return the study as Markdown."""
    counts = study["counts"]
    shown = sorted({*np.linspace(0, len(counts) - 1, SHOWN_COUNTS).round().astype(int).tolist()})
    texts = study["texts"]
    lines = [
        f"## {study['name']}",
        "",
        f"{len(texts)} texts, {study['prefixes']} prefixes; the model obeys the constraint by "
        f"itself with probability {study['mass']:.4g}.",
        "",
        "| text | p(text given constraint) | drawn by masking with probability |",
        "|---|---|---|",
        *(f"| `{t['text']}` | {t['truth']:.4f} | {t['masked']:.4f} |" for t in texts[:SHOWN_TEXTS]),
    ]
    if len(texts) > SHOWN_TEXTS:
        truth, masked = (sum(t[key] for t in texts[SHOWN_TEXTS:]) for key in ("truth", "masked"))
        lines.append(f"| {len(texts) - SHOWN_TEXTS} others | {truth:.4f} | {masked:.4f} |")
    lines += [
        "",
        "KL(truth, estimate) in nats after n samples: median of "
        f"{study['repetitions']} repetitions [least, largest]",
        "",
        "| | " + " | ".join(f"n = {counts[i]}" for i in shown) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for label, repetitions in study["curves"].items():
        values = np.array(repetitions)
        cells = (
            f"{np.median(values[:, i]):.4f} [{values[:, i].min():.4f}, {values[:, i].max():.4f}]"
            for i in shown
        )
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    floors = {
        "perfect sampler": study["floor"],
        **{f"floor of {label}": floor for label, floor in study["weighted_floors"].items()},
    }
    for label, floor in floors.items():
        cells = (
            f"{floor['mean'][i]:.4f} [{floor['low'][i]:.4f}, {floor['high'][i]:.4f}]" for i in shown
        )
        lines.append(f"| *{label}: mean [5%, 95%]* | " + " | ".join(cells) + " |")
    lines += [
        "",
        "The floor of weighted samples is that of as many exact draws as they are worth, n times "
        "the effective share below.",
        "",
        f"With endless samples masking stays at {study['masking_limit']:.4f}.",
        "",
        "| | mean weight | standard error | true mass | errors off | effective share of samples |",
        "|---|---|---|---|---|---|",
    ]
    for method, weight in study["weights"].items():
        off = (weight["mean_weight"] - study["mass"]) / weight["standard_error"]
        lines.append(
            f"| {method} | {weight['mean_weight']:.4g} | {weight['standard_error']:.2g} "
            f"| {study['mass']:.4g} | {off:+.1f} | {weight['ess_share']:.2f} |"
        )
    lines += [
        "",
        "| | rows of logits per text | restarts per text | checks per row | full masks per row "
        "| texts without an end |",
        "|---|---|---|---|---|---|",
        *(
            f"| {method} | {cost['rows_per_text']:.2f} | {cost['restarts_per_text']:.3f} "
            f"| {cost['checks_per_row']:.1f} | {cost['masks_per_row']:.2f} "
            f"| {cost['dead_texts']} |"
            for method, cost in study["costs"].items()
        ),
        "",
    ]
    return "\n".join(lines)


def engine_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the comparison as Markdown."""
    lines = [
        "## Engine and cores, same seeds",
        "",
        "| | texts | same tokens | attempts (same) | largest difference of a log weight |",
        "|---|---|---|---|---|",
        *(
            f"| {row['method']} | {row['texts']} | {row['same_texts']} "
            f"| {row['attempts']} ({row['same_attempts']} of {row['texts']} texts) "
            f"| {row['largest_log_weight_difference']:.1e} |"
            for row in rows
        ),
        "",
    ]
    return "\n".join(lines)


def draw(study: dict[str, Any], path: Path) -> None:
    """Draw divergence against the number of samples.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    counts, floor = study["counts"], study["floor"]
    axes.fill_between(
        counts, floor["low"], floor["high"], color="0.85", label="perfect sampler, 5 to 95%"
    )
    awrs = study["weighted_floors"]["AWRS"]
    axes.fill_between(
        counts,
        awrs["low"],
        awrs["high"],
        color="tab:orange",
        alpha=0.1,
        hatch="///",
        linewidth=0,
        label="exact draws, as many as those of AWRS are worth",
    )
    axes.axhline(
        study["masking_limit"], color="0.4", linewidth=0.8, linestyle=":", label="limit of masking"
    )
    for label, repetitions in study["curves"].items():
        values = np.array(repetitions)
        color, style = STYLES[label]
        axes.plot(counts, np.median(values, axis=0), style, color=color, label=label)
        axes.fill_between(
            counts, values.min(axis=0), values.max(axis=0), color=color, alpha=0.12, linewidth=0
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="number of samples",
        ylabel="KL(truth, estimate), nats",
        title=f"{len(study['texts'])} texts; probability of the constraint {study['mass']:.2g}\n"
        f"median and range of {study['repetitions']} repetitions",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=150)


def main(
    result: Annotated[Path, typer.Argument(help="JSON that toy.py has written.")],
    markdown: Annotated[Path | None, typer.Option(help="Write the tables here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the picture of the first task.")] = None,
) -> None:
    """Render a result again."""
    known = json.loads(result.read_text(encoding="utf-8"))
    write(known, markdown, plot)


def write(result: dict[str, Any], markdown: Path | None, plot: Path | None) -> None:
    """Write what is wanted of a result."""
    if markdown:
        markdown.write_text(page(result), encoding="utf-8")
    if plot:
        draw(result["studies"][0], plot)


if __name__ == "__main__":
    typer.run(main)
