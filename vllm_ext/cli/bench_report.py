# SPDX-License-Identifier: Apache-2.0
"""From the measurements of a benchmark to numbers, a table and a plot."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_ext.cli.arms import NONE
from vllm_ext.cli.bench_run import Measurement
from vllm_ext.cli.stats import median_ratio, quantiles_ms

if TYPE_CHECKING:
    from rich.table import Table

    from vllm_ext.cli.engine_types import RequestResult

Key = tuple[int, int]  # (group, round): what pairs a measurement with that of another arm


def summarise(measurements: Sequence[Measurement]) -> dict[str, list[dict[str, Any]]]:
    """Per arm, one entry of plain JSON types per batch size, in order of first appearance.

    Every arm must have been measured on the same groups and rounds as "none".
    """
    arms = list(dict.fromkeys(m.arm for m in measurements))
    batches = list(dict.fromkeys(m.batch for m in measurements))
    return {
        arm: [
            _entry(
                batch,
                _pick(measurements, arm, batch),
                _pick(measurements, NONE, batch),
            )
            for batch in batches
        ]
        for arm in arms
    }


def _pick(measurements: Iterable[Measurement], arm: str, batch: int) -> dict[Key, Measurement]:
    return {(m.group, m.round): m for m in measurements if m.arm == arm and m.batch == batch}


def _entry(
    batch: int, own: dict[Key, Measurement], baseline: dict[Key, Measurement]
) -> dict[str, Any]:
    requests = [r for m in own.values() for r in m.result.requests]
    rounds = sorted({round_index for _, round_index in own})
    return {
        "batch": batch,
        "groups": len({group for group, _ in own}),
        "rounds": len(rounds),
        "requests": len(requests),
        **_throughput(own.values()),
        "ttft_ms": quantiles_ms([r.first_token_s for r in requests]),
        "inter_token_ms": quantiles_ms(
            [r.decode_s / (r.num_tokens - 1) for r in requests if r.num_tokens > 1]
        ),
        "ratio": _ratio(own, baseline),
        # A drafter that learns sees the same prompts again from the second round on.
        "ratio_by_round": [
            _ratio(_of_round(own, index), _of_round(baseline, index)) for index in rounds
        ],
        "identical_to_none": _identical_fraction(own, baseline),
        "tasks": _per_task(own, baseline),
    }


def _throughput(measurements: Iterable[Measurement]) -> dict[str, Any]:
    """Speed and speculation counts.

    A step of a request yields one token plus the accepted drafts, so that the steps are the tokens
    less the accepted ones; each step computes one row plus one per drafted token.
    """
    results = [m.result for m in measurements]
    tokens = sum(r.num_tokens for r in results)
    drafted = sum(r.draft_tokens for r in results)
    accepted = sum(r.accepted_tokens for r in results)
    steps = tokens - accepted
    return {
        "tokens": tokens,
        "steps": steps,
        "draft_tokens": drafted,
        "accepted_tokens": accepted,
        "tokens_per_s": tokens / sum(r.wall_s for r in results),
        "tokens_per_step": tokens / steps,
        "rows_per_step": 1 + drafted / steps,
    }


def _ratio(own: dict[Key, Measurement], baseline: dict[Key, Measurement]) -> dict[str, float]:
    return median_ratio(
        _times_by_group(baseline),
        _times_by_group(own),
    ).as_dict()


def _times_by_group(measurements: dict[Key, Measurement]) -> list[list[float]]:
    groups: dict[int, list[float]] = {}
    for (group, _), measurement in sorted(measurements.items()):
        groups.setdefault(group, []).append(measurement.seconds_per_token)
    return list(groups.values())


def _of_round(measurements: dict[Key, Measurement], round_index: int) -> dict[Key, Measurement]:
    return {key: m for key, m in measurements.items() if key[1] == round_index}


def _identical_fraction(own: dict[Key, Measurement], baseline: dict[Key, Measurement]) -> float:
    same = [
        _tokens(mine) == _tokens(theirs)
        for key, m in own.items()
        for mine, theirs in zip(m.result.requests, baseline[key].result.requests, strict=True)
    ]
    return sum(same) / len(same)


def _tokens(request: RequestResult) -> list[list[int]]:
    return [c.token_ids for c in request.completions]


def _per_task(
    own: dict[Key, Measurement], baseline: dict[Key, Measurement]
) -> dict[str, dict[str, Any]]:
    """The same numbers per task, over the groups whose prompts are all of that task."""
    tasks: dict[str, list[Key]] = {}
    for key, measurement in own.items():
        names = {p.task for p in measurement.prompts}
        tasks.setdefault(names.pop() if len(names) == 1 else "(mixed)", []).append(key)
    return {
        task: {
            "groups": len({group for group, _ in keys}),
            **_throughput([own[key] for key in keys]),
            "ratio": _ratio({k: own[k] for k in keys}, {k: baseline[k] for k in keys}),
        }
        for task, keys in tasks.items()
    }


def overview_table(arms: dict[str, list[dict[str, Any]]]) -> Table:
    """One line per arm and batch size."""
    table = _table("Speed against plain vLLM (ratio: median, 95% interval over prompt groups)")
    table.add_column("arm", no_wrap=True)
    for header in ("batch", "tok/s", "tok/step", "rows/step", "TTFT ms", "ITL ms", "ratio", "same"):
        table.add_column(header, justify="right", no_wrap=True)
    for arm, entries in arms.items():
        for e in entries:
            ratio = e["ratio"]
            table.add_row(
                arm,
                str(e["batch"]),
                f"{e['tokens_per_s']:.1f}",
                f"{e['tokens_per_step']:.2f}",
                f"{e['rows_per_step']:.2f}",
                _number(e["ttft_ms"]["median"]),
                _number(e["inter_token_ms"]["median"]),
                f"{ratio['median']:.2f} [{ratio['low']:.2f} {ratio['high']:.2f}]",
                f"{e['identical_to_none']:.0%}",
            )
    return table


def task_table(arms: dict[str, list[dict[str, Any]]]) -> Table:
    """Ratio to "none" and tokens per step: one line per task, a column per arm and batch size."""
    cells = [(arm, e) for arm, entries in arms.items() if arm != NONE for e in entries]
    table = _table("Ratio to plain vLLM per task (tokens per step)")
    table.add_column("task")
    for arm, e in cells:
        table.add_column(f"{arm} b{e['batch']}", justify="right")
    for task in sorted({task for _, e in cells for task in e["tasks"]}):
        found = [e["tasks"].get(task) for _, e in cells]
        table.add_row(
            task,
            *(
                f"{t['ratio']['median']:.2f} ({t['tokens_per_step']:.2f})" if t else "-"
                for t in found
            ),
        )
    return table


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def plot(arms: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Bars of the ratio to "none" with its interval, per batch size and per task, as an image.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # Not a plain import: matplotlib is an optional extra, and the type checker need not have it.
    figure_module: Any = importlib.import_module("matplotlib.figure")
    shown = {arm: entries for arm, entries in arms.items() if arm != NONE} or arms
    figure = figure_module.Figure(figsize=(11, 4), layout="constrained")
    by_batch, by_task = figure.subplots(1, 2, width_ratios=[1, 2])
    _bars(
        by_batch,
        {a: {str(e["batch"]): e["ratio"] for e in entries} for a, entries in shown.items()},
    )
    first = {arm: entries[0] for arm, entries in shown.items()}
    _bars(by_task, {a: {t: v["ratio"] for t, v in e["tasks"].items()} for a, e in first.items()})
    by_batch.set_xlabel("batch size")
    by_batch.set_ylabel("speed relative to plain vLLM")
    by_task.set_title(f"per task, batch {next(iter(first.values()))['batch']}")
    by_batch.legend()
    figure.savefig(path, dpi=150)


def _bars(axes: Any, series: dict[str, dict[str, dict[str, float]]]) -> None:
    labels = list(dict.fromkeys(x for values in series.values() for x in values))
    width = 0.8 / len(series)
    for i, (arm, values) in enumerate(series.items()):
        rows = [(j, values[label]) for j, label in enumerate(labels) if label in values]
        middle = [r["median"] for _, r in rows]
        axes.bar(
            [j + (i - (len(series) - 1) / 2) * width for j, _ in rows],
            middle,
            width,
            label=arm,
            yerr=[
                [r["median"] - r["low"] for _, r in rows],
                [r["high"] - r["median"] for _, r in rows],
            ],
            capsize=2,
        )
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(labels)), labels, rotation=20 if len(labels) > 3 else 0)
