# SPDX-License-Identifier: Apache-2.0
"""The tasks of the AWRS paper (arXiv 2504.05410): masking, AWRS and AWRS-SMC side by side.

The suites ``jsonschemabench`` and ``json_schema_test_suite`` are JSON schemas beyond mask engines.

Per task, masking and AWRS draw as many answers side by side as SMC has particles, so that all run
at the same batch size; a single answer is scored by the mean over them, and the one with the
largest weight is a control for SMC: it costs the same but nothing is resampled. SMC answers with
the text of the largest posterior probability. What was cut off or died counts as wrong.

    python examples/constraints/awrs_tasks.py --data DIR --model HuggingFaceTB/SmolLM2-135M-Instruct

``DIR`` holds the suites' folders. The molecules need ``rdkit`` and the predicate of this folder:
``pip install rdkit ./examples/constraints/smiles``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import suite
import typer
from awrs_judges import SUITES, Task, Verdict

SINGLE = ("masking", "awrs")
ALL = (*SINGLE, "smc")
DEFAULT_SUITES = ",".join(folder for folder in SUITES if folder.startswith("awrs_"))
LABELS = {
    "masking": "masking, 1 answer",
    "awrs": "AWRS, 1 answer",
    "awrs best": "AWRS, largest weight of {n}",
    "smc": "AWRS-SMC, {n} particles",
}


def judged(task: Task, text: str, complete: bool, log_weight: float) -> dict[str, Any]:
    """Judge one answer; plain types."""
    verdict = task.judge(text) if complete else Verdict(False, False)
    return {
        "text": text,
        "complete": complete,
        # JSON has no infinities.
        "log_weight": log_weight if math.isfinite(log_weight) else None,
        **vars(verdict),
    }


def run_single(llm: Any, task: Task, method: str, count: int, seed: int) -> dict[str, Any]:
    """Draw ``count`` answers side by side."""
    from vllm import SamplingParams

    from vllm_ext.constraints import generate

    spec = task.mask_spec if method == "masking" else task.spec
    assert spec is not None
    params = [
        SamplingParams(
            max_tokens=task.max_tokens,
            extra_args={
                f"constraint_{spec.kind}": spec.source,
                "constraint_method": method,
                "constraint_seed": seed + i,
            },
        )
        for i in range(count)
    ]
    start = time.perf_counter()
    samples = generate(llm, [task.prompt] * count, params)
    return {
        "seconds": time.perf_counter() - start,
        "tokens": sum(len(sample.token_ids) for sample in samples),
        "checks": sum(sample.record.checks for sample in samples),
        "masks": sum(sample.record.mask_fallbacks for sample in samples),
        "errors": [sample.record.error for sample in samples if sample.record.error],
        "answers": [
            judged(task, sample.text, sample.record.state == "complete", sample.log_weight)
            for sample in samples
        ],
    }


def run_smc(llm: Any, task: Task, particles: int, seed: int) -> dict[str, Any]:
    """Draw a population; its answer is the text of the largest posterior probability."""
    from vllm_ext import smc

    start = time.perf_counter()
    drawn = smc.sample(
        llm,
        task.prompt,
        task.spec,
        particles=particles,
        ess=0.5,
        max_tokens=task.max_tokens,
        seed=seed,
        show_progress=False,
    )
    seconds = time.perf_counter() - start
    best = next(iter(drawn.posterior()), None)
    return {
        "seconds": seconds,
        "tokens": sum(len(particle.tokens) for particle in drawn.particles),
        "checks": drawn.checks,
        "masks": drawn.mask_fallbacks,
        "errors": [],
        "resamplings": drawn.resamplings,
        "answers": [judged(task, best or "", best is not None, drawn.log_evidence)],
    }


def best_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run with only its answer of the largest weight."""
    weight = [
        -math.inf if answer["log_weight"] is None else answer["log_weight"]
        for answer in run["answers"]
    ]
    return {**run, "answers": [run["answers"][weight.index(max(weight))]]}


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Reduce the runs of one method, one per task, to means over tasks with their intervals."""

    def over_tasks(key: str) -> dict[str, Any]:
        return suite.mean_spread(
            [sum(a[key] for a in run["answers"]) / len(run["answers"]) for run in runs]
        )

    scores = [a["score"] for run in runs for a in run["answers"] if a["score"] is not None]
    tokens = sum(run["tokens"] for run in runs)
    return {
        "tasks": len(runs),
        "answers": sum(len(run["answers"]) for run in runs),
        "complete": over_tasks("complete"),
        "valid": over_tasks("valid"),
        "accurate": over_tasks("accurate"),
        "score": suite.mean_spread(scores),
        "tokens": tokens,
        "checks_per_token": sum(run["checks"] for run in runs) / max(1, tokens),
        "masks_per_token": sum(run["masks"] for run in runs) / max(1, tokens),
        "ms_per_token": suite.quantiles(
            [run["seconds"] / run["tokens"] for run in runs if run["tokens"]], 1e3
        ),
        "errors": sum(len(run["errors"]) for run in runs),
    }


def agreement(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Count the draws in which AWRS, its weights ignored, gave the text of masking.

    Both draw with the same noise, so that they differ only where their languages do.

    Args:
        entries: per task, the run of each method that has taken it.

    Returns:
        The count, and both texts of every draw that differs; ``None`` without a common task.
    """
    pairs = [
        (task, masked["text"], awrs["text"])
        for task, runs in entries.items()
        if set(SINGLE) <= set(runs)
        for masked, awrs in zip(*(runs[method]["answers"] for method in SINGLE), strict=True)
    ]
    if not pairs:
        return None
    different = [pair for pair in pairs if pair[1] != pair[2]]
    return {
        "same": suite.share(len(pairs) - len(different), len(pairs)),
        "different": [
            {"task": task, "masking": masked, "awrs": awrs} for task, masked, awrs in different
        ],
    }


def methods_of(task: Task, methods: Sequence[str]) -> list[str]:
    """Return those of ``methods`` that can take a task."""
    return [m for m in methods if m != "masking" or task.mask_spec is not None]


def key_of(name: str, task: Task, method: str) -> str:
    """Return the key of a run in the journal."""
    return f"{name}:{task.id}:{method}"


def finished(
    name: str,
    tasks: Sequence[Task],
    entries: Mapping[str, dict[str, Any]],
    methods: Sequence[str] = ALL,
) -> dict[str, dict[str, Any]]:
    """Return the runs of the tasks of a suite that all of their ``methods`` have taken."""
    keys = {
        task.id: {m: key_of(name, task, m) for m in methods_of(task, methods)} for task in tasks
    }
    return {
        task: {method: entries[key] for method, key in runs.items()}
        for task, runs in keys.items()
        if all(key in entries for key in runs.values())
    }


def compare(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Summarise a suite: over all tasks, and over those that masks can express.

    Args:
        entries: per task, the run of each method that could take it.
    """
    maskable = {task: runs for task, runs in entries.items() if "masking" in runs}
    groups = {"all tasks": entries}
    if len(maskable) < len(entries):
        groups["tasks that masks can express"] = maskable
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for group, tasks in groups.items():
        found[group] = {}
        for method in LABELS:
            source = "awrs" if method == "awrs best" else method
            runs = [run[source] for run in tasks.values() if source in run]
            # A method that takes only some of the tasks is compared on those alone.
            if runs and len(runs) == len(tasks):
                chosen = [best_of(run) for run in runs] if method == "awrs best" else runs
                found[group][method] = summarise(chosen)
    return found


def report(results: Mapping[str, Any], particles: int) -> str:
    """Return the markdown of ``{suite: result of compare}``."""
    parts = []
    for name, groups in results.items():
        for group, methods in groups.items():
            if not methods:
                continue
            count = next(iter(methods.values()))["tasks"]
            table = suite.markdown_table(
                [
                    "method",
                    "complete %",
                    "valid %",
                    "accurate %",
                    "QED" if name == "awrs_molecular" else "score",
                    "checks per token",
                    "masks per token",
                    "ms per token (median / p90)",
                    "gave up",
                ],
                [
                    [
                        LABELS[method].format(n=particles),
                        *(_percent(m[key]) for key in ("complete", "valid", "accurate")),
                        suite.show_mean(m["score"]),
                        f"{m['checks_per_token']:.1f}",
                        f"{m['masks_per_token']:.2f}",
                        suite.show_quantiles(m["ms_per_token"], 1),
                        m["errors"],
                    ]
                    for method, m in methods.items()
                ],
            )
            parts.append(f"## {name}: {group} ({count})\n\n{table}")
    return "\n".join(parts)


def report_agreement(same: Mapping[str, Any]) -> str:
    """Return the markdown of ``{suite: result of agreement}``."""
    if not same:
        return ""
    table = suite.markdown_table(
        ["suite", "same text", "different"],
        [
            [name, suite.show_share(found["same"]), len(found["different"])]
            for name, found in same.items()
        ],
    )
    differing = suite.markdown_table(
        ["task", "masking", "AWRS"],
        [
            [pair["task"], *(f"`{json.dumps(pair[method])}`" for method in SINGLE)]
            for found in same.values()
            for pair in found["different"]
        ],
    )
    return (
        "\n## AWRS without its weights against masking, draw by draw with the same noise\n\n"
        f"{table}\n{differing}"
    )


def _percent(part: Mapping[str, Any]) -> str:
    if part["mean"] is None:
        return "-"
    if part["n"] == 1:
        return f"{100 * part['mean']:.0f}"
    return f"{100 * part['mean']:.0f} [{100 * part['low']:.0f}, {100 * part['high']:.0f}]"


def plot(results: Mapping[str, Any], particles: int, path: Path) -> None:
    """Draw the accuracy of each method, one group of bars per suite."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    groups = [
        (f"{name.removeprefix('awrs_')}\n{group}", methods)
        for name, found in results.items()
        for group, methods in found.items()
        if methods
    ]
    figure, axis = plt.subplots(figsize=(10, 4))
    for i, (method, label) in enumerate(LABELS.items()):
        at = [j + (i - 1.5) * 0.2 for j, (_, m) in enumerate(groups) if method in m]
        parts = [m[method]["accurate"] for _, m in groups if method in m]
        middle = [100 * p["mean"] for p in parts]
        errors = [
            [math.nan if p["n"] == 1 else 100 * abs(p[end] - p["mean"]) for p in parts]
            for end in ("low", "high")
        ]
        axis.bar(at, middle, 0.2, yerr=errors, capsize=2, label=label.format(n=particles))
    axis.set_xticks(range(len(groups)), [name for name, _ in groups], fontsize=7)
    axis.set_ylabel("accurate, %")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    data: Annotated[Path, typer.Option(help="Folder of the folders awrs_*.")],
    model: Annotated[str, typer.Option(help="A folder or Hugging Face name.")],
    out: Annotated[Path, typer.Option(help="Results, without suffix.")] = Path("build/awrs_tasks"),
    suites: Annotated[str, typer.Option(help="Names of folders, with commas.")] = DEFAULT_SUITES,
    tasks: Annotated[int, typer.Option(help="First tasks of each suite; 0 takes all.")] = 0,
    methods: Annotated[str, typer.Option(help="Names with commas.")] = ",".join(ALL),
    maskable: Annotated[
        bool, typer.Option("--maskable", help="Only tasks that masks can express.")
    ] = False,
    particles: Annotated[int, typer.Option(min=2)] = 5,
    dtype: Annotated[str, typer.Option()] = "float32",
    seed: Annotated[int, typer.Option()] = 0,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Report the journal of a run that was cut off.")
    ] = False,
) -> None:
    """Answer tasks under constraints and judge the answers."""
    settings = {
        "model": Path(model).name,
        "dtype": dtype,
        "particles": particles,
        "seed": seed,
    }
    journal = suite.Journal(out.with_suffix(".journal.jsonl"), settings)
    names = methods.split(",")
    if unknown := set(names) - set(ALL):
        raise typer.BadParameter(f"methods {sorted(unknown)}; allowed: {', '.join(ALL)}")
    chosen = {
        name: [t for t in SUITES[name](data / name) if not maskable or t.mask_spec is not None][
            : tasks or None
        ]
        for name in suites.split(",")
    }
    wanted = [
        (key_of(name, task, method), task, method)
        for position in range(max(map(len, chosen.values())))
        for name, some in chosen.items()
        for task in some[position : position + 1]
        for method in methods_of(task, names)
    ]
    missing = [piece for piece in wanted if piece[0] not in journal]
    if missing and not report_only:
        llm = suite.open_engine(
            model, dtype=dtype, max_model_len=2048, max_num_seqs=particles, line_ends_text=True
        )
        with suite.progress_bar("tasks x methods", len(missing)) as (bar, bar_task):
            for key, task, method in missing:
                if method == "smc":
                    run = run_smc(llm, task, particles, seed)
                else:
                    run = run_single(llm, task, method, particles, seed)
                journal.add(key, run)
                bar.advance(bar_task)
    entries = {name: finished(name, some, journal.entries, names) for name, some in chosen.items()}
    results = {name: compare(runs) for name, runs in entries.items()}
    same = {name: found for name, runs in entries.items() if (found := agreement(runs))}
    result = {
        "environment": suite.environment(model, dtype),
        "settings": settings | {"tasks": tasks},
        "results": results,
        "agreement": same,
    }
    body = (
        f"T=1, top_p=1, {particles} requests side by side in every method, plain prompts, a line "
        "break ends an answer. Means over tasks with 95% bootstrap intervals; a single answer's "
        f"score is the mean over {particles} draws per task. Cut-off and dead texts count as "
        "wrong. Masks are full token masks (for masking one per token, for AWRS its fallback). "
        "Times are wall-clock per emitted token, the model's own time included.\n\n"
        f"{report(results, particles)}{report_agreement(same)}"
    )
    suite.write_report(out, result, "Tasks under constraints", body)
    plot(results, particles, out.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
