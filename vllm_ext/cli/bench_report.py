# SPDX-License-Identifier: Apache-2.0
"""From the measurements of a benchmark to numbers, a table and a plot."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_ext.cli.arms import NONE
from vllm_ext.cli.bench_run import Measurement
from vllm_ext.cli.stats import median_ratio, quantiles_ms

if TYPE_CHECKING:
    from rich.table import Table

    from vllm_ext.cli.engine_types import GenerateResult, RequestResult
    from vllm_ext.cli.prompts import EncodedPrompt

MIXED = "(mixed)"
Key = tuple[int, int]  # (group, round): what pairs a measurement with that of another arm


def summarise(measurements: Sequence[Measurement]) -> dict[str, list[dict[str, Any]]]:
    """Per arm, one entry of plain JSON types per batch size, in order of first appearance.

    Every arm must have been measured on the same groups and rounds as "none".
    """
    arms = list(dict.fromkeys(m.arm for m in measurements))
    batches = list(dict.fromkeys(m.batch for m in measurements))
    picked = {(a, batch): _pick(measurements, a, batch) for a in arms for batch in batches}
    return {
        arm: [
            _entry(batch, picked[arm, batch], picked[NONE, batch])
            # Paired group by group, which two ratios to "none" side by side are not.
            | {"ratio_to": {a: _ratio(picked[arm, batch], picked[a, batch]) for a in arms}}
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
        "datasets": _per_part(own, baseline, lambda prompt: prompt.dataset),
        "tasks": _per_part(own, baseline, lambda prompt: prompt.task),
    }


def _throughput(measurements: Collection[Measurement]) -> dict[str, Any]:
    """Speed and speculation counts.

    Each step of a request computes one row plus one per drafted token. Steps are counted, not
    taken for the tokens less the accepted ones: those that lie beyond an answer's end were accepted
    and are not among its tokens.
    """
    results = [m.result for m in measurements]
    tokens = sum(r.num_tokens for r in results)
    drafted = sum(r.draft_tokens for r in results)
    accepted = sum(r.accepted_tokens for r in results)
    steps = sum(r.request_steps for r in results)
    return {
        "tokens": tokens,
        "steps": steps,
        "draft_tokens": drafted,
        "accepted_tokens": accepted,
        "tokens_per_s": tokens / sum(r.wall_s for r in results),
        "tokens_per_step": tokens / steps,
        "rows_per_step": 1 + drafted / steps,
        **_drafting(results),
    }


def _drafting(results: Sequence[GenerateResult]) -> dict[str, float | None]:
    """Share of wall time spent drafting, and milliseconds per engine step; None where not ours."""
    seconds = sum(r.drafting_s or 0.0 for r in results)
    steps = sum(r.engine_steps or 0 for r in results)
    ours = all(r.drafting_s is not None for r in results)
    return {
        "drafting_share": seconds / sum(r.wall_s for r in results) if ours else None,
        "drafting_ms_per_step": 1e3 * seconds / steps if ours and steps else None,
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


def _per_part(
    own: dict[Key, Measurement],
    baseline: dict[Key, Measurement],
    part_of: Callable[[EncodedPrompt], str],
) -> dict[str, dict[str, Any]]:
    """The same numbers per task or data set, over the groups whose prompts are all of it."""
    parts: dict[str, list[Key]] = {}
    for key, measurement in own.items():
        names = {part_of(p) for p in measurement.prompts}
        parts.setdefault(names.pop() if len(names) == 1 else MIXED, []).append(key)
    return {
        part: {
            "groups": len({group for group, _ in keys}),
            **_throughput([own[key] for key in keys]),
            "ratio": _ratio({k: own[k] for k in keys}, {k: baseline[k] for k in keys}),
        }
        for part, keys in parts.items()
    }


def overview_table(arms: dict[str, list[dict[str, Any]]]) -> Table:
    """One line per arm and batch size."""
    table = _table("Speed against plain vLLM (ratio: median, 95% interval over prompt groups)")
    table.add_column("arm", no_wrap=True)
    for header in (
        "batch",
        "tok/s",
        "tok/\nstep",
        "rows/\nstep",
        "TTFT\nms",
        "ITL\nms",
        "ratio",
        "same",
        "draft\n%",
        "draft\nms/step",
    ):
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
                _number(e["drafting_share"], 100),
                _number(e["drafting_ms_per_step"], digits=2),
            )
    return table


def task_table(arms: dict[str, list[dict[str, Any]]]) -> Table:
    """Ratio to "none" and tokens per step: a line per data set and task, a column per arm and size.

    Data sets have lines of their own where there are several, each followed by its tasks.
    """
    cells = [(arm, e) for arm, entries in arms.items() if arm != NONE for e in entries]
    table = _table("Ratio to plain vLLM per task (tokens per step)")
    table.add_column("task")
    for arm, e in cells:
        table.add_column(f"{arm} b{e['batch']}", justify="right")
    for kind, name in parts([e for _, e in cells]):
        found = [e[kind].get(name) for _, e in cells]
        table.add_row(
            name,
            *(
                f"{t['ratio']['median']:.2f} ({t['tokens_per_step']:.2f})" if t else "-"
                for t in found
            ),
        )
    return table


def parts(entries: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Lines of a table by task: the key of an entry, "tasks" or "datasets", and a name under it."""
    datasets = list(dict.fromkeys(name for e in entries for name in e["datasets"]))
    tasks = sorted({name for e in entries for name in e["tasks"]})
    if len(datasets) < 2:
        return [("tasks", name) for name in tasks]
    return [
        line
        for dataset in sorted(datasets, key=lambda name: name == MIXED)
        for line in (
            ("datasets", dataset),
            *(("tasks", name) for name in tasks if name.startswith(f"{dataset}/")),
        )
    ]


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)


def _number(value: float | None, factor: float = 1.0, digits: int = 1) -> str:
    return "-" if value is None else f"{factor * value:.{digits}f}"


def plot(arms: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Bars of the ratio to "none" with its interval as an image.

    Per batch size, and per task, or per data set where there are several.

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
    several = any(len(e["datasets"]) > 1 for e in first.values())
    kind, per = ("datasets", "per data set") if several else ("tasks", "per task")
    _bars(by_task, {a: {t: v["ratio"] for t, v in e[kind].items()} for a, e in first.items()})
    by_batch.set_xlabel("batch size")
    by_batch.set_ylabel("speed relative to plain vLLM")
    by_task.set_title(f"{per}, batch {next(iter(first.values()))['batch']}")
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
