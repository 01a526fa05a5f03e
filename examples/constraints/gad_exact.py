# SPDX-License-Identifier: Apache-2.0
"""Is CARS exact? A test of its draws on the tasks of grammar-aligned decoding.

:mod:`gad` normalises the model's law over the programs that were found. An exact sampler misses
that law too, since it also draws rare programs, each of which is entered with the share of one
draw. Here the programs are named before they are counted: the first half of the draws says which,
the second half is counted among them. Given that a program is one of those, an exact sampler
follows ``P(w)`` normalised over them and nothing is unknown. How many draws fall outside is tested
by itself, between the bounds of ``P(grammar)``: the mass of all programs found, and the bound at
the root of the trie. Draws of masking are put to the same test, which they must fail.

``--cores`` draws without an engine (:mod:`gad_cores`), which is quick enough for thousands.

    python examples/constraints/gad_exact.py --data gad/dev.jsonl --task SLIA/firstname \
        --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import gad
import numpy as np
import suite
import typer
from gad import Program
from scipy.stats import binom, combine_pvalues

_REPETITIONS = 20_000
_BLOCK = 100  # draws per task of gad.py


def whole(run: Mapping[str, Any]) -> list[tuple[Program, float]]:
    """Return the complete programs of a run with their log probabilities, in order."""
    return [(tuple(d["tokens"]), d["log_prob"]) for d in run["draws"] if d["state"] == "complete"]


def fit(
    drawn: Sequence[Program], log_law: Mapping[Program, float], seed: int = 0
) -> dict[str, Any]:
    """Test draws against a law that knows all of them, by their divergence from it.

    Returns:
        The divergence, what as many exact draws have (mean, central 95%), and the p-value: the
        share of exact samples that are as far away.
    """
    values = gad.exact_divergences(log_law, len(drawn), _REPETITIONS, seed)
    seen = gad.divergence(drawn, log_law)
    low, high = np.quantile(values, [0.025, 0.975])
    # Equal samples must count as equal whatever the order of summation.
    as_far = int((values >= seen - 1e-9).sum())
    return {
        "n": len(drawn),
        "cells": len(log_law),
        "divergence": seen,
        "floor": {"mean": float(values.mean()), "low": float(low), "high": float(high)},
        "p": (as_far + 1) / (_REPETITIONS + 1),
    }


def fit_outside(count: int, n: int, low: float, high: float) -> float:
    """Return the two-sided p-value of ``count`` of ``n``, whose chance is from low to high."""
    return float(min(1.0, 2 * min(binom.sf(count - 1, n, high), binom.cdf(count, n, low))))


def judge(cars: Mapping[str, Any], masking: Mapping[str, Any], log_bound: float) -> dict[str, Any]:
    """Test the second half of the draws of CARS, and those of masking.

    Args:
        cars: what :func:`gad.draw` returned, at least two programs.
        masking: the same for the control.
        log_bound: bound of the trie's root, at least ``log P(grammar)``.
    """
    drawn = whole(cars)
    half = len(drawn) // 2
    log_probs: dict[Program, float] = {}
    for program, value in drawn[:half]:
        log_probs.setdefault(program, value)
    every = dict(log_probs)
    for program, value in [*drawn[half:], *whole(masking)]:
        every.setdefault(program, value)
    law = gad.normalised(log_probs)
    named, found = (math.fsum(map(math.exp, some.values())) for some in (log_probs, every))
    # Probabilities are read in float32, so the found mass may pass the bound by rounding.
    bound = max(math.exp(log_bound), found)
    counted = [program for program, _ in drawn[half:]]
    inside = [program for program in counted if program in law]
    outside = len(counted) - len(inside)
    low, high = 1 - named / found, 1 - named / bound
    control = [program for program, _ in whole(masking)]
    control_inside = [program for program in control if program in law]
    control_outside = len(control) - len(control_inside)
    return {
        "draws": len(drawn),
        "attempts": cars["attempts"],
        "mass_found": found,
        "mass_bound": bound,
        "inside": fit(inside, law),
        "outside": {
            "count": outside,
            "n": len(counted),
            "low": low,
            "high": high,
            "p": fit_outside(outside, len(counted), low, high),
        },
        "control": {
            "inside": fit(control_inside, law) if control_inside else None,
            "outside": {
                "count": control_outside,
                "n": len(control),
                "p": fit_outside(control_outside, len(control), low, high),
            },
        },
        "blocks": by_blocks(drawn, dict(whole(masking))),
    }


def by_blocks(
    drawn: Sequence[tuple[Program, float]], known: Mapping[Program, float]
) -> dict[str, list[float]]:
    """Measure blocks of draws as :mod:`gad` does, and among programs that others have named.

    Args:
        drawn: programs with their log probabilities, in order.
        known: programs that another method has found.

    Returns:
        Per block, how far its divergence is above the mean of exact draws: ``found`` from the law
        over the programs of the block and the known ones, ``named`` among the programs that occur
        outside of the block, so that no program counts for being drawn.
    """
    above: dict[str, list[float]] = {"found": [], "named": []}
    for start in range(0, len(drawn) - _BLOCK + 1, _BLOCK):
        block = drawn[start : start + _BLOCK]
        others = dict([*drawn[:start], *drawn[start + _BLOCK :]])
        for kind, law in (("found", {**known, **dict(block)}), ("named", others)):
            inside = [program for program, _ in block if program in law]
            if not inside:
                continue
            log_law = gad.normalised(law)
            floor = gad.exact_divergences(log_law, len(inside), 2000).mean()
            above[kind].append(gad.divergence(inside, log_law) - float(floor))
    return above


def combined(results: Mapping[str, dict[str, Any]]) -> dict[str, float]:
    """Return Fisher's combination of the p-values over tasks."""
    return {
        part: float(combine_pvalues([found[part]["p"] for found in results.values()]).pvalue)
        for part in ("inside", "outside")
    }


def report(results: Mapping[str, dict[str, Any]]) -> str:
    """Return the markdown of ``{task: result of judge}``."""

    def cell(part: dict[str, Any] | None) -> list[str]:
        if part is None:
            return ["-", "-", "-"]
        floor = part["floor"]
        return [
            f"{part['divergence']:.4f} (n = {part['n']})",
            f"{floor['mean']:.4f} [{floor['low']:.4f}, {floor['high']:.4f}]",
            f"{part['p']:.2g}",
        ]

    def control(part: dict[str, Any]) -> list[str]:
        seen, _, p = cell(part["inside"])
        outside = part["outside"]
        return [seen, p, f"{outside['count']}/{outside['n']}", f"{outside['p']:.2g}"]

    return suite.markdown_table(
        [
            "task",
            "draws",
            "requests",
            "P(grammar): found, bound",
            "programs named",
            "KL among them",
            "exact draws",
            "p",
            "outside: seen, expected share",
            "p",
            "masking: KL among them",
            "p",
            "masking: outside",
            "p",
        ],
        [
            [
                task,
                found["draws"],
                found["attempts"],
                f"{found['mass_found']:.4g}, {found['mass_bound']:.4g}",
                found["inside"]["cells"],
                *cell(found["inside"]),
                f"{found['outside']['count']}/{found['outside']['n']}, "
                f"{found['outside']['low']:.3f} to {found['outside']['high']:.3f}",
                f"{found['outside']['p']:.2g}",
                *control(found["control"]),
            ]
            for task, found in results.items()
        ],
    )


def _root_bound(worker: Any) -> float:
    """Return the bound of the trie that was used last."""
    from vllm_ext.constraints.records import find_processor

    processor = find_processor(worker)
    assert processor is not None
    *_, newest = processor.batch.sessions.tries
    return float(newest.root.log_live)


def _by_cores(model: str, dtype: str) -> tuple[Any, Callable[..., dict[str, Any]]]:
    import gad_cores

    return gad_cores.Source(model, dtype), gad_cores.draw


def _by_engine(model: str, dtype: str, batch: int) -> tuple[Any, Callable[..., dict[str, Any]]]:
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # a function goes to our own worker
    llm = suite.open_engine(
        model, dtype=dtype, max_model_len=2048, max_num_seqs=batch, line_ends_text=True
    )

    def draw(llm: Any, row: dict[str, Any], method: str, **options: Any) -> dict[str, Any]:
        run = gad.draw(llm, row, method, **options)
        if method == "cars":
            [run["log_bound"]] = llm.collective_rpc(_root_bound)
        return run

    return llm, draw


def main(
    data: Annotated[Path, typer.Option(help="JSONL of tasks with prompt and grammar_ebnf.")],
    model: Annotated[str, typer.Option(help="A folder or Hugging Face name.")],
    task: Annotated[list[str], typer.Option(help="Id of a task; may be repeated.")],
    out: Annotated[Path, typer.Option(help="Results, without suffix.")] = Path("build/gad_exact"),
    samples: Annotated[int, typer.Option(min=4, help="Programs of CARS per task.")] = 300,
    control: Annotated[int, typer.Option(min=1, help="Programs of masking per task.")] = 100,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of a program, its end included.")] = 56,
    batch: Annotated[int, typer.Option(min=1, help="Requests side by side.")] = 32,
    max_attempts: Annotated[int, typer.Option(min=1, help="Requests of CARS per task.")] = 1280,
    cores: Annotated[
        bool, typer.Option("--cores", help="Draw by the cores on logits of transformers.")
    ] = False,
    dtype: Annotated[str, typer.Option()] = "float32",
    seed: Annotated[int, typer.Option()] = 1,
) -> None:
    """Draw programs by CARS and test them against the model's law given the grammar."""
    settings = {
        "model": Path(model).name,
        "dtype": dtype,
        "samples": samples,
        "control": control,
        "max_tokens": max_tokens,
        "batch": batch,
        "max_attempts": max_attempts,
        "seed": seed,
        "cores": cores,
    }
    rows = {row["id"]: row for row in suite.read_rows(data) if row["id"] in task}
    if missing := set(task) - set(rows):
        raise typer.BadParameter(f"{data} has no task {', '.join(sorted(missing))}")
    journal = suite.Journal(out.with_suffix(".journal.jsonl"), settings)
    wanted = [(name, method) for name in task for method in ("cars", "masking")]
    left = [(name, method) for name, method in wanted if f"{name}:{method}" not in journal]
    if left:
        source, draw = _by_cores(model, dtype) if cores else _by_engine(model, dtype, batch)
        with suite.progress_bar("tasks x methods", len(left)) as (bar, bar_task):
            for name, method in left:
                run = draw(
                    source,
                    rows[name],
                    method,
                    samples=samples if method == "cars" else control,
                    max_tokens=max_tokens,
                    batch=batch,
                    max_attempts=max_attempts,
                    seed=seed,
                )
                journal.add(f"{name}:{method}", run)
                bar.advance(bar_task)
    results = {}
    for name in task:
        cars = journal.entries[f"{name}:cars"]
        results[name] = judge(cars, journal.entries[f"{name}:masking"], cars["log_bound"])
    overall = combined(results)
    blocks = {
        kind: suite.mean_spread([v for found in results.values() for v in found["blocks"][kind]])
        for kind in ("found", "named")
    }
    result = {
        "environment": suite.environment(model, dtype),
        "settings": settings,
        "combined_p": overall,
        "blocks": blocks,
        "tasks": results,
    }
    body = (
        f"Drawn by {'the cores, on logits of transformers' if cores else 'vLLM'}: "
        f"{samples} programs of CARS per task (at most {max_attempts} requests), T=1, top_p=1, at "
        f"most {max_tokens} tokens, {batch} requests side by side. The first half names the "
        "programs, the second half is counted among them (KL to `P` normalised over them, against "
        f"{_REPETITIONS} exact samples of the same size) and outside of them (share expected "
        f"between the bounds of `P(grammar)`). Control: {control} draws of masking, counted among "
        "the same programs.\n\n"
        f"{report(results)}\nFisher's combination over tasks: p = {overall['inside']:.2g} among "
        f"the programs named, p = {overall['outside']:.2g} outside of them.\n\n"
        f"{blocks['found']['n']} blocks of {_BLOCK} draws, KL above the mean of exact draws (means "
        "over blocks with 95% bootstrap intervals): to the law over the programs of the block and "
        f"of masking, as `gad.py` measures, {suite.show_mean(blocks['found'], 3)} nats; among the "
        "programs that the other draws of the task have named, "
        f"{suite.show_mean(blocks['named'], 3)} nats.\n"
    )
    suite.write_report(out, result, "Is CARS exact?", body)


if __name__ == "__main__":
    typer.run(main)
