# SPDX-License-Identifier: Apache-2.0
"""The toy's numbers as Markdown tables and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

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
    floor = study["floor"]
    cells = (
        f"{floor['mean'][i]:.4f} [{floor['low'][i]:.4f}, {floor['high'][i]:.4f}]" for i in shown
    )
    lines += [
        "| *perfect sampler: mean [5%, 95%]* | " + " | ".join(cells) + " |",
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
        title=f"{len(study['texts'])} texts, probability of the constraint {study['mass']:.2g}; "
        f"median and range of {study['repetitions']}",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=150)
