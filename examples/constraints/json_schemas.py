# SPDX-License-Identifier: Apache-2.0
"""How faithfully and how fast do constraints follow JSON schemas?

Each labelled instance is written as ``json.dumps`` writes it, tokenized, and fed token by token to
the constraint, as a model that wants to say it would. Counted per engine: schemas that compile
within the limits, invalid instances that are accepted (under-constraining) and valid ones that are
refused (over-constraining), the time to the first mask and the time per token. Times are processor
time, which other work on the machine changes little. Understands the rows of JSONSchemaBench
(arXiv 2501.10868) and of the official JSON Schema test suite.

    python examples/constraints/json_schemas.py --data jsonschemabench/dev.jsonl \
        --data json_schema_test_suite/dev.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import suite
import typer

from logits_processors.compilation import Spec, compile_constraint
from logits_processors.constraint import (
    CompiledConstraint,
    Constraint,
    ConstraintError,
    ConstraintRuntimeError,
)
from logits_processors.limits import DEFAULT_LIMITS, Limits
from logits_processors.vetting import Vetter
from logits_processors.vocabulary import Vocabulary

ENGINES: dict[str, Callable[[str], Spec]] = {
    "xgrammar": lambda schema: Spec("json_schema", schema),
    "llguidance": lambda schema: Spec("lark", f"start: %json {schema}"),
    "json_validate": lambda schema: Spec("json_validate", schema),
}
"""How to ask for a JSON schema, given as text, by engine."""


@dataclass
class Feed:
    """What happened to one instance.

    Attributes:
        accepted: whether the whole text was taken and the end of the text allowed after it.
        refused_at: index of the first refused token, the number of tokens if it was the end;
            ``None`` if accepted.
        error: why the constraint gave up; empty if it did not.
        mask_s: processor seconds of each mask, one before each token that was tried.
        check_s: processor seconds of each check of the next token of the text.
    """

    accepted: bool
    refused_at: int | None = None
    error: str = ""
    mask_s: list[float] = field(default_factory=list)
    check_s: list[float] = field(default_factory=list)


def feed(constraint: Constraint, ids: Sequence[int], eos: int) -> Feed:
    """Feed the tokens ``ids`` and then ``eos``, timing what a sampler would ask at each."""
    seen = Feed(False)
    clock = time.process_time
    try:
        for position, token in enumerate([*ids, eos]):
            start = clock()
            constraint.mask()
            masked = clock()
            allowed = constraint.allows(token)
            seen.mask_s.append(masked - start)
            seen.check_s.append(clock() - masked)
            if not (allowed and constraint.accept(token)):
                seen.refused_at = position
                return seen
    except ConstraintRuntimeError as error:
        seen.error = str(error)
        return seen
    seen.accepted = True
    return seen


def outcome_of(
    compiled: CompiledConstraint,
    tests: Sequence[dict[str, Any]],
    encode: Callable[[str], list[int]],
) -> list[dict[str, Any]]:
    """Feed every labelled instance of a schema; one plain record per instance."""
    records = []
    eos = compiled.vocabulary.eos_ids[0]
    for test in tests:
        seen = feed(compiled.start(), encode(json.dumps(test["data"])), eos)
        records.append(
            {
                "valid": test["valid"],
                "accepted": seen.accepted,
                "refused_at": seen.refused_at,
                "error": seen.error,
                "mask_us": [round(1e6 * s, 2) for s in seen.mask_s],
                "check_us": [round(1e6 * s, 2) for s in seen.check_s],
            }
        )
    return records


def evaluate(
    engine: str,
    row: dict[str, Any],
    vocabulary: Vocabulary,
    encode: Callable[[str], list[int]],
    vet: Callable[[str, str], None],
) -> dict[str, Any]:
    """Compile a row's schema with ``engine`` and feed its instances.

    Args:
        engine: a name in ``ENGINES``.
        row: with ``schema`` and ``tests`` (each with ``data`` and ``valid``).
        vocabulary: the model's vocabulary.
        encode: text to token ids.
        vet: raises ``ConstraintError`` for a (kind, source) that breaks the limits.
    """
    spec = ENGINES[engine](json.dumps(row["schema"]))
    try:
        vet(spec.kind, spec.source)
        start = time.process_time()
        compiled = compile_constraint(spec, vocabulary)
        compiled_at = time.process_time()
        compiled.start().mask()
        first = time.process_time()
    except (ConstraintError, ConstraintRuntimeError) as error:
        return {"engine": engine, "compiled": False, "error": str(error)}
    return {
        "engine": engine,
        "compiled": True,
        "compile_ms": 1e3 * (compiled_at - start),
        "first_mask_ms": 1e3 * (first - start),
        "tests": outcome_of(compiled, row["tests"], encode),
    }


def reason_of(error: str) -> str:
    """Reduce a refusal to its kind, so that refusals can be counted."""
    for mark, kind in (
        ("did not finish", "time or memory limit"),
        ("nothing", "empty language"),
        ("no first token", "empty language"),
        ("no finite text", "empty language"),
        ("Unimplemented keys", "unsupported keyword"),
        ("Unknown format", "unknown format"),
        ("oneOf", "oneOf"),
    ):
        if mark in error:
            return kind
    return "other"


def summarise(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Reduce the entries of one data set and engine to the numbers of the report."""
    compiled = [entry for entry in entries if entry["compiled"]]
    tests = [test for entry in compiled for test in entry["tests"]]
    sound = [test for test in tests if not test["error"]]
    valid = [test for test in sound if test["valid"]]
    invalid = [test for test in sound if not test["valid"]]
    faithful = sum(
        all(test["accepted"] == test["valid"] and not test["error"] for test in entry["tests"])
        for entry in compiled
    )
    refusals = Counter(reason_of(entry["error"]) for entry in entries if not entry["compiled"])
    return {
        "schemas": len(entries),
        "coverage": suite.share(len(compiled), len(entries)),
        "refusals": dict(refusals.most_common()),
        "under": suite.share(sum(test["accepted"] for test in invalid), len(invalid)),
        "over": suite.share(sum(not test["accepted"] for test in valid), len(valid)),
        "faithful": suite.share(faithful, len(entries)),
        "runtime_errors": len(tests) - len(sound),
        "compile_ms": suite.quantiles([entry["compile_ms"] for entry in compiled]),
        "first_mask_ms": suite.quantiles([entry["first_mask_ms"] for entry in compiled]),
        "mask_us": suite.quantiles([t for test in sound for t in test["mask_us"]]),
        "check_us": suite.quantiles([t for test in sound for t in test["check_us"]]),
    }


def report(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the markdown of ``{data set: {engine: summary}}``."""
    parts = []
    for name, engines in results.items():
        labels = markdown_labels(engines)
        times = suite.markdown_table(
            ["engine", "compile ms", "first mask ms", "mask us", "(mean)", "check us", "(mean)"],
            [
                [
                    engine,
                    suite.show_quantiles(found["compile_ms"], 1),
                    suite.show_quantiles(found["first_mask_ms"], 1),
                    suite.show_quantiles(found["mask_us"], 1),
                    _mean(found["mask_us"]),
                    suite.show_quantiles(found["check_us"], 1),
                    _mean(found["check_us"]),
                ]
                for engine, found in engines.items()
            ],
        )
        refusals = "".join(
            f"- {engine} refused: "
            + (", ".join(f"{n} {reason}" for reason, n in found["refusals"].items()) or "none")
            + "\n"
            for engine, found in engines.items()
        )
        parts.append(
            f"## {name}\n\n{labels}\n{refusals}\nTimes are processor time, median / 90th "
            "percentile over schemas (compile, first mask) and over the tokens of the instances "
            f"(mask, check):\n\n{times}"
        )
    return "\n".join(parts)


def markdown_labels(engines: dict[str, dict[str, Any]]) -> str:
    """Return the table of coverage and of agreement with the labels."""
    return suite.markdown_table(
        [
            "engine",
            "compiles",
            "invalid accepted (under)",
            "valid refused (over)",
            "compiles and all labels right",
            "gave up",
        ],
        [
            [
                engine,
                *(suite.show_share(found[k]) for k in ("coverage", "under", "over", "faithful")),
                found["runtime_errors"],
            ]
            for engine, found in engines.items()
        ],
    )


def _mean(part: dict[str, Any]) -> str:
    return "-" if part["mean"] is None else f"{part['mean']:.0f}"


def plot(results: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Draw coverage and both kinds of error per engine, one panel per data set."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(5.5 * len(results), 3.6), squeeze=False)
    kinds = {
        "coverage": "compiles",
        "faithful": "all labels right",
        "under": "invalid accepted",
        "over": "valid refused",
    }
    for axis, (name, engines) in zip(axes[0], results.items(), strict=True):
        for i, (engine, found) in enumerate(engines.items()):
            shares = [found[kind] for kind in kinds]
            at = [j + (i - 1) * 0.26 for j in range(len(kinds))]
            middle = [100 * (s["share"] or 0.0) for s in shares]
            low = [m - 100 * (s["low"] or 0.0) for m, s in zip(middle, shares, strict=True)]
            high = [100 * (s["high"] or 0.0) - m for m, s in zip(middle, shares, strict=True)]
            axis.bar(at, middle, 0.26, yerr=[low, high], capsize=2, label=engine)
        axis.set_xticks(range(len(kinds)), list(kinds.values()), fontsize=8)
        axis.set_ylabel("%")
        axis.set_title(name)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    data: Annotated[list[Path], typer.Option(help="A JSONL file of labelled schemas.")],
    model: Annotated[str, typer.Option(help="Whose tokenizer: a folder or Hugging Face name.")],
    out: Annotated[Path, typer.Option(help="Results, without suffix.")] = Path("build/json"),
    engines: Annotated[str, typer.Option(help="Names with commas.")] = ",".join(ENGINES),
    limit: Annotated[int, typer.Option(help="Schemas per file; 0 takes all.")] = 0,
    compile_seconds: Annotated[
        float, typer.Option(help="Wall-clock limit of a compilation; raise it on a busy machine.")
    ] = DEFAULT_LIMITS.compile_seconds,
) -> None:
    """Feed labelled JSON instances to the constraints that their schemas compile to."""
    names = engines.split(",")
    tokenizer, vocabulary = suite.load_vocabulary(model)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        assert vocabulary.spell(ids) == text.encode(), "the tokenizer changes the text"
        return ids

    limits = Limits(compile_seconds=compile_seconds)
    journal = suite.Journal(
        out.with_suffix(".journal.jsonl"), {"model": Path(model).name, "limits": vars(limits)}
    )
    results: dict[str, dict[str, dict[str, Any]]] = {}
    skipped: dict[str, int] = {}
    with Vetter(vocabulary, limits) as vetter:
        for path in data:
            rows = suite.read_rows(path)
            kept = [r for r in rows if not (r.get("optional") or r.get("uses_remote"))]
            name = path.parent.name
            skipped[name] = len(rows) - len(kept)
            kept = kept[: limit or None]
            with suite.progress_bar(name, len(kept) * len(names)) as (bar, task):
                for row in kept:
                    for engine in names:
                        key = f"{name}:{engine}:{row['id']}"
                        if key not in journal:
                            found = evaluate(engine, row, vocabulary, encode, vetter.check)
                            journal.add(key, found)
                        bar.advance(task)
            results[name] = {
                engine: summarise([journal.entries[f"{name}:{engine}:{r['id']}"] for r in kept])
                for engine in names
            }
    body = report(results) + "".join(
        f"\n{name}: {count} rows skipped (optional, or with references to other documents).\n"
        for name, count in skipped.items()
        if count
    )
    result = {
        "environment": suite.environment(model),
        "limits": vars(limits),
        "skipped": skipped,
        "results": results,
    }
    suite.write_report(out, result, "JSON schemas", body)
    plot(results, out.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
