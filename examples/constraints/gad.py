# SPDX-License-Identifier: Apache-2.0
"""Grammar-aligned decoding on program synthesis: masking, ASAp and CARS on one model.

The tasks and the measures are those of arXiv 2405.21047: how far is the law of the drawn programs
from the model's own law given the grammar, ``P(w) / P(grammar)``? ``P(grammar)`` is unknown, so
``P`` is normalised over all distinct programs that any method found; an empirical law has at best
the divergence of as many exact draws, which is simulated and shown as the floor. Prompts are the
plain few-shot ones of the data, without a chat template; a line break ends a program.

    python examples/constraints/gad.py --data gad/dev.jsonl \
        --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import suite
import typer
from numpy.typing import NDArray

METHODS = ("masking", "asap", "cars")
_FLOOR_DRAWS = 400
_ENOUGH = 10
_SEEDS_APART = 1 << 32

Program: TypeAlias = tuple[int, ...]
"""Token ids, end of text included."""


def normalised(log_probs: Mapping[Program, float]) -> dict[Program, float]:
    """Return the log probabilities scaled to a total of 1."""
    values = np.array(list(log_probs.values()))
    top = values.max()
    total = top + math.log(np.exp(values - top).sum())
    return {program: value - total for program, value in log_probs.items()}


def divergence(drawn: Sequence[Program], log_law: Mapping[Program, float]) -> float:
    """Return ``KL(empirical law of drawn || law)`` in nats.

    Args:
        drawn: at least one program, all of them in ``log_law``.
        log_law: normalised log probabilities.
    """
    count = len(drawn)
    return sum(
        n / count * (math.log(n / count) - log_law[program])
        for program, n in Counter(drawn).items()
    )


def exact_divergences(
    log_law: Mapping[Program, float], count: int, repetitions: int, seed: int = 0
) -> NDArray[np.float64]:
    """Return the divergence of ``count`` exact draws from ``log_law``, ``repetitions`` times."""
    noise = np.random.default_rng(seed)
    logs = np.array(list(log_law.values()))
    shares = np.exp(logs)
    counts = noise.multinomial(count, shares / shares.sum(), size=repetitions) / count
    values: NDArray[np.float64] = (counts * (np.log(np.where(counts > 0, counts, 1.0)) - logs)).sum(
        axis=1
    )
    return values


def floor(log_law: Mapping[Program, float], count: int, seed: int = 0) -> dict[str, Any]:
    """Return the divergence of ``count`` exact draws from ``log_law``, over many repetitions."""
    values = exact_divergences(log_law, count, _FLOOR_DRAWS, seed)
    low, high = np.quantile(values, [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def weighted_mean(values: Sequence[float], log_weights: Sequence[float]) -> float:
    """Return the self-normalised weighted mean."""
    logs = np.asarray(log_weights)
    weights = np.exp(logs - logs.max())
    return float((weights * np.asarray(values)).sum() / weights.sum())


def measure(runs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Compare the methods on one task.

    Args:
        runs: per method what :func:`draw` returned.

    Returns:
        ``programs`` (distinct), ``found`` (their mass under the model), ``expected`` (under the
        normalised law) and, per method, the numbers of the report.
    """
    whole = {
        method: [d for d in run["draws"] if d["state"] == "complete"]
        for method, run in runs.items()
    }
    log_probs: dict[Program, float] = {}
    for draws in whole.values():
        for d in draws:
            # Logits change a little with the batch; the first reading stands for all.
            log_probs.setdefault(tuple(d["tokens"]), d["log_prob"])
    if not log_probs:
        return {"programs": 0, "methods": {}}
    law = normalised(log_probs)
    mass = math.fsum(math.exp(value) for value in log_probs.values())
    found: dict[str, Any] = {
        "programs": len(law),
        "found_mass": mass,
        "expected_log_likelihood": math.fsum(math.exp(v) * log_probs[p] for p, v in law.items()),
        "expected_share": math.fsum(math.exp(2 * v) for v in law.values()),
        "methods": {},
    }
    for method, draws in whole.items():
        run = runs[method]
        programs = [tuple(d["tokens"]) for d in draws]
        entry: dict[str, Any] = {
            "drawn": len(run["draws"]),
            "complete": len(draws),
            "attempts": run["attempts"],
            "forwards": run["forwards"],
            "seconds": run["seconds"],
            "forwards_per_program": run["forwards"] / len(draws) if draws else None,
        }
        if draws:
            quarter = programs[-max(1, len(run["draws"]) // 4) :]
            likelihoods = [d["log_prob"] for d in draws]
            entry |= {
                "distinct": len(set(programs)),
                "log_likelihood": suite.mean_spread(likelihoods),
                "weighted_log_likelihood": weighted_mean(
                    likelihoods, [d["log_weight"] for d in draws]
                ),
                "share": suite.mean_spread([math.exp(law[p]) for p in programs]),
                "divergence": divergence(programs, law),
                "floor": floor(law, len(programs)),
                "divergence_last_quarter": divergence(quarter, law),
                "floor_last_quarter": floor(law, len(quarter)),
            }
        found["methods"][method] = entry
    return found


def draw(
    llm: Any,
    row: dict[str, Any],
    method: str,
    *,
    samples: int,
    max_tokens: int,
    batch: int,
    max_attempts: int,
    seed: int,
) -> dict[str, Any]:
    """Draw programs of one task, in rounds of ``batch`` requests side by side.

    Rounds are finished before the next one, and programs count in the order of submission: taking
    those that come first would prefer short ones.

    Returns:
        ``draws`` (tokens, log probability under the model, log weight, state), the number of
        requests, of forward passes (one per token, that of a rejection included) and seconds.
    """
    from vllm import SamplingParams

    from vllm_ext.constraints.offline import log_weight, results

    # One request alone leaves the prompt in the prefix cache for the batch.
    llm.generate([row["prompt"]], SamplingParams(max_tokens=1), use_tqdm=False)
    draws: list[dict[str, Any]] = []
    attempts = forwards = 0
    start = time.perf_counter()
    while len(draws) < samples and attempts < max_attempts:
        count = batch if method == "cars" else min(batch, samples - len(draws))
        names = [f"{row['id']}/{method}/{attempts + i}" for i in range(count)]
        params = [
            SamplingParams(
                max_tokens=max_tokens,
                logprobs=0,
                extra_args={
                    "constraint_ebnf": row["grammar_ebnf"],
                    "constraint_method": method,
                    "constraint_seed": seed * _SEEDS_APART + attempts + i,
                    "constraint_id": name,
                },
            )
            for i, name in enumerate(names)
        ]
        outputs = llm.generate([row["prompt"]] * count, params, use_tqdm=False)
        records = results(llm, names)
        attempts += count
        for name, output in zip(names, outputs, strict=True):
            [record], completion = records[name], output.outputs[0]
            forwards += len(record.token_ids)
            if record.state == "error":
                raise RuntimeError(f"{name}: {record.error}")
            if record.state == "restart":
                continue
            draws.append(
                {
                    "tokens": list(completion.token_ids),
                    "log_prob": completion.cumulative_logprob,
                    "log_weight": log_weight(record, len(completion.token_ids)),
                    "state": record.state,
                }
            )
    return {
        "draws": draws[:samples],
        "attempts": attempts,
        "forwards": forwards,
        "seconds": time.perf_counter() - start,
    }


def choose(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return ``count`` tasks, as many of each split as there are, shortest prompts first."""
    splits: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: (r["tok_smollm2"], r["id"])):
        splits.setdefault(row["split"], []).append(row)
    queues = [splits[name] for name in sorted(splits)]
    longest = max(map(len, queues))
    return [queue[i] for i in range(longest) for queue in queues if i < len(queue)][:count]


def report(results: Mapping[str, dict[str, Any]]) -> str:
    """Return the markdown of ``{task: result of measure}``."""
    rows = []
    for task, found in results.items():
        for method, m in found["methods"].items():
            drawn = bool(m["complete"])
            rows.append(
                [
                    task,
                    method,
                    f"{m['complete']}/{m['drawn']}",
                    m["distinct"] if drawn else "-",
                    suite.show_mean(m["log_likelihood"]) if drawn else "-",
                    f"{found['expected_log_likelihood']:.2f}",
                    f"{m['divergence']:.2f}" if drawn else "-",
                    f"{m['divergence_last_quarter']:.2f}" if drawn else "-",
                    f"{m['floor']['mean']:.2f} [{m['floor']['low']:.2f}, {m['floor']['high']:.2f}]"
                    if drawn
                    else "-",
                    f"{m['forwards_per_program']:.0f}" if drawn else "-",
                    m["attempts"],
                ]
            )
    return suite.markdown_table(
        [
            "task",
            "method",
            "complete",
            "distinct",
            "mean log P(w)",
            "expected",
            "KL",
            "KL, last quarter",
            "floor of KL",
            "forwards per program",
            "requests",
        ],
        rows,
    )


def means(results: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return, per method, means over the tasks on which every method drew enough programs.

    The law of a handful of draws is far from any, or at no distance from itself.
    """
    enough = [
        found
        for found in results.values()
        if found["methods"] and all(m["complete"] >= _ENOUGH for m in found["methods"].values())
    ]
    tasks = [found["methods"] for found in enough]
    names = list(tasks[0]) if tasks else []
    expected = [found["expected_log_likelihood"] for found in enough]
    return {
        name: {
            "divergence": suite.mean_spread([t[name]["divergence"] for t in tasks]),
            "above_floor": suite.mean_spread(
                [t[name]["divergence"] - t[name]["floor"]["mean"] for t in tasks]
            ),
            "log_likelihood_minus_expected": suite.mean_spread(
                [
                    t[name]["log_likelihood"]["mean"] - e
                    for t, e in zip(tasks, expected, strict=True)
                ]
            ),
            "forwards_per_program": suite.mean_spread(
                [t[name]["forwards_per_program"] for t in tasks]
            ),
        }
        for name in names
    }


def means_table(found: Mapping[str, dict[str, Any]]) -> str:
    """Return the result of :func:`means` as markdown."""
    return suite.markdown_table(
        [
            "method",
            "tasks",
            "KL",
            "KL above its floor",
            "mean log P(w) minus expected",
            "forwards per program",
        ],
        [
            [
                name,
                entry["divergence"]["n"],
                suite.show_mean(entry["divergence"]),
                suite.show_mean(entry["above_floor"]),
                suite.show_mean(entry["log_likelihood_minus_expected"]),
                suite.show_mean(entry["forwards_per_program"], 0),
            ]
            for name, entry in found.items()
        ],
    )


def body(result: Mapping[str, Any]) -> str:
    """Return the markdown of a whole result."""
    settings = result["settings"]
    return (
        f"{settings['samples']} programs per task and method (CARS: at most "
        f"{settings['max_attempts']} requests), T=1, top_p=1, at most {settings['max_tokens']} "
        f"tokens, {settings['batch']} requests side by side, plain few-shot "
        "prompts, a line break ends a program. KL of the drawn programs to the model's law "
        "normalised over all programs that any method found; the floor is what as many exact "
        "draws from it would have (mean and central 95% of "
        f"{_FLOOR_DRAWS} repetitions), if there were no other programs. Means over the tasks on "
        f"which every method completed at least {_ENOUGH} programs, with 95% bootstrap "
        f"intervals:\n\n{means_table(result['means'])}\nPer task (log P(w) with 95% bootstrap "
        "intervals over programs; 'expected' is its mean under the normalised law):\n\n"
        f"{report(result['tasks'])}"
    )


def plot(results: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Draw, per task, the divergence of each method and its floor."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 4.2))
    names = list(METHODS)
    for i, method in enumerate(names):
        at, height = [], []
        for j, found in enumerate(results.values()):
            entry = found["methods"].get(method)
            if entry and entry["complete"]:
                at.append(j + (i - 1) * 0.26)
                height.append(entry["divergence"])
                middle = entry["floor"]["mean"]
                axis.errorbar(
                    at[-1],
                    middle,
                    yerr=[[middle - entry["floor"]["low"]], [entry["floor"]["high"] - middle]],
                    fmt="_k",
                    capsize=2,
                    label="exact draws" if i == 0 and j == 0 else None,
                )
        axis.bar(at, height, 0.26, label=method)
    axis.set_xticks(
        range(len(results)),
        [t.split("/")[-1] for t in results],
        rotation=35,
        ha="right",
        fontsize=7,
    )
    axis.set_ylabel("KL(drawn || P given grammar), nats")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    data: Annotated[Path, typer.Option(help="JSONL of tasks with prompt and grammar_ebnf.")],
    model: Annotated[str, typer.Option(help="A folder or Hugging Face name.")],
    out: Annotated[Path, typer.Option(help="Results, without suffix.")] = Path("build/gad"),
    tasks: Annotated[int, typer.Option(min=1, help="Shortest prompts of each split first.")] = 10,
    samples: Annotated[int, typer.Option(min=1, help="Programs per task and method.")] = 100,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of a program, its end included.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Requests side by side.")] = 32,
    max_attempts: Annotated[int, typer.Option(min=1, help="Requests of CARS per task.")] = 640,
    dtype: Annotated[str, typer.Option()] = "float32",
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Draw programs under a grammar by each method and compare their laws."""
    settings = {
        "model": Path(model).name,
        "dtype": dtype,
        "samples": samples,
        "max_tokens": max_tokens,
        "batch": batch,
        "max_attempts": max_attempts,
        "seed": seed,
    }
    journal = suite.Journal(out.with_suffix(".journal.jsonl"), settings)
    chosen = choose(suite.read_rows(data), tasks)
    wanted = [(row, method) for row in chosen for method in METHODS]
    missing = [pair for pair in wanted if f"{pair[0]['id']}:{pair[1]}" not in journal]
    if missing:
        llm = suite.open_engine(
            model, dtype=dtype, max_model_len=2048, max_num_seqs=batch, line_ends_text=True
        )
        with suite.progress_bar("tasks x methods", len(missing)) as (bar, bar_task):
            for row, method in missing:
                run = draw(
                    llm,
                    row,
                    method,
                    samples=samples,
                    max_tokens=max_tokens,
                    batch=batch,
                    max_attempts=max_attempts,
                    seed=seed,
                )
                journal.add(f"{row['id']}:{method}", run)
                bar.advance(bar_task)
    results = {
        row["id"]: measure({m: journal.entries[f"{row['id']}:{m}"] for m in METHODS})
        for row in chosen
    }
    overall = means(results)
    result = {
        "environment": suite.environment(model, dtype),
        "settings": settings,
        "means": overall,
        "tasks": results,
    }
    suite.write_report(out, result, "Grammar-aligned decoding", body(result))
    plot(results, out.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
