# SPDX-License-Identifier: Apache-2.0
"""JSON schemas in a running engine: vLLM's structured outputs and ours side by side.

Two engines stand side by side, because vLLM chooses its backend per engine. One request runs at a
time; per schema all ways of asking take turns, in an order that moves on from schema to schema:
first greedy, then at temperature 1. Whoever is first to name a schema compiles it, so the time to
the first token is told apart: *cold* where this kind of constraint sees the schema for the first
time (masking and AWRS share what they compile), *warm* otherwise. The prompt is in the prefix cache
before. Both clocks start when the request is handed to the engine, validation included.

Greedy texts are compared token for token with those of vLLM's structured outputs.

    python examples/constraints/json_engine.py --data jsonschemabench/dev.jsonl \
        --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import suite
import typer

BACKENDS = ("xgrammar", "guidance")
ARMS: Mapping[str, tuple[str, str, str]] = {
    "no constraint": ("xgrammar", "", ""),
    "vLLM, xgrammar": ("xgrammar", "structured", ""),
    "vLLM, guidance": ("guidance", "structured", ""),
    "json_schema, masking": ("xgrammar", "constraint_json_schema", "masking"),
    "json_schema, AWRS": ("xgrammar", "constraint_json_schema", "awrs"),
    "json_validate, AWRS": ("xgrammar", "constraint_json_validate", "awrs"),
}
"""Per way of asking: backend of its engine, kind of constraint, method."""

TURNS = {"greedy": 0.0, "T=1": 1.0}
_BASE = "vLLM, xgrammar"
_PROMPT = "Write one JSON value that satisfies this JSON schema, and nothing else.\n%s"
_LONGEST_SCHEMA = 2000  # characters
_TOKENS_TO_TIME = 4  # fewer say little about the time per token


def choose(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return ``count`` schemas spread evenly over the rows whose schema is short enough."""
    short = [row for row in rows if len(json.dumps(row["schema"])) <= _LONGEST_SCHEMA]
    return [short[i * len(short) // count] for i in range(min(count, len(short)))]


def parameters(arm: str, turn: str, schema: str, name: str, max_tokens: int) -> Any:
    """Return the sampling parameters of a request."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    _, kind, method = ARMS[arm]
    options: dict[str, Any] = {}
    if kind == "structured":
        options["structured_outputs"] = StructuredOutputsParams(json=schema)
    elif kind:
        options["extra_args"] = {kind: schema, "constraint_method": method, "constraint_id": name}
    return SamplingParams(temperature=TURNS[turn], max_tokens=max_tokens, seed=0, **options)


def timed(llm: Any, name: str, prompt: Sequence[int], params: Any) -> dict[str, Any]:
    """Run one request; a refused one has only ``refused``, with the reason."""
    from vllm.exceptions import VLLMValidationError

    engine = llm.llm_engine
    stamps: list[float] = []
    tokens: list[int] = []
    reason: str | None = None
    start = time.perf_counter()
    try:
        engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
    except (VLLMValidationError, ValueError) as error:
        return {"refused": str(error)}
    while engine.has_unfinished_requests():
        for output in engine.step():
            [completion] = output.outputs
            reason = completion.finish_reason
            if len(completion.token_ids) > len(tokens):
                stamps.append(time.perf_counter())
                tokens = list(completion.token_ids)
    if not tokens or reason not in ("stop", "length"):
        return {"refused": f"ended by the engine: {reason}"}
    found: dict[str, Any] = {
        "tokens": tokens,
        "complete": reason == "stop",
        "first_ms": 1e3 * (stamps[0] - start),
    }
    if len(stamps) >= _TOKENS_TO_TIME:
        found["token_ms"] = 1e3 * (stamps[-1] - stamps[0]) / (len(stamps) - 1)
    return found


def ask(
    engines: Mapping[str, Any],
    row: dict[str, Any],
    prompt: Sequence[int],
    max_tokens: int,
    order: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Run all requests of one schema; per turn and way of asking what :func:`timed` returned."""
    from vllm import SamplingParams

    from vllm_ext.constraints.offline import results

    schema = json.dumps(row["schema"])
    for llm in engines.values():
        timed(llm, f"{row['id']}/prompt", prompt, SamplingParams(max_tokens=1))
    compiled: set[tuple[str, str]] = set()
    turns: dict[str, dict[str, Any]] = {}
    for turn in TURNS:
        turns[turn] = {}
        for arm in order:
            backend, kind, method = ARMS[arm]
            name = f"{row['id']}/{turn}/{arm}"
            found = timed(
                engines[backend], name, prompt, parameters(arm, turn, schema, name, max_tokens)
            )
            found["cold"] = (backend, kind) not in compiled
            compiled.add((backend, kind))
            if method and "tokens" in found:
                [record] = results(engines[backend], [name])[name]
                if record.state == "error":
                    found = {"refused": record.error}
            turns[turn][arm] = found
    return turns


def summarise(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Reduce the entries of all schemas to the numbers of the report."""
    return {
        "arms": {arm: _arm(entries, arm) for arm in ARMS},
        "greedy_equal": {
            f"{ours} = {theirs}": _equal(entries, ours, theirs)
            for theirs in ("vLLM, xgrammar", "vLLM, guidance")
            for ours in ("json_schema, masking", "json_schema, AWRS", "json_validate, AWRS")
        },
    }


def _arm(entries: Sequence[Mapping[str, Any]], arm: str) -> dict[str, Any]:
    runs = [entry[turn][arm] for entry in entries for turn in TURNS]
    ran = [run for run in runs if "tokens" in run]
    ratios = [
        entry[turn][arm]["token_ms"] / entry[turn][_BASE]["token_ms"]
        for entry in entries
        for turn in TURNS
        if "token_ms" in entry[turn][arm] and "token_ms" in entry[turn][_BASE]
    ]
    return {
        "ran": len(ran),
        "refused": len(runs) - len(ran),
        "complete": suite.share(sum(run["complete"] for run in ran), len(ran)),
        "cold_first_ms": suite.quantiles([r["first_ms"] for r in ran if r["cold"]]),
        "warm_first_ms": suite.quantiles([r["first_ms"] for r in ran if not r["cold"]]),
        "token_ms": suite.quantiles([r["token_ms"] for r in ran if "token_ms" in r]),
        "token_ratio": suite.mean_spread(ratios),
    }


def _equal(entries: Sequence[Mapping[str, Any]], ours: str, theirs: str) -> dict[str, Any]:
    """Compare the greedy texts of the schemas that both took."""
    pairs = [
        (entry["key"], entry["greedy"][ours]["tokens"], entry["greedy"][theirs]["tokens"])
        for entry in entries
        if "tokens" in entry["greedy"][ours] and "tokens" in entry["greedy"][theirs]
    ]
    return {
        **suite.share(sum(a == b for _, a, b in pairs), len(pairs)),
        "tokens": sum(len(a) for _, a, _ in pairs),
        "different": [
            {
                "schema": key,
                "at": next(
                    (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
                    min(len(a), len(b)),
                ),
            }
            for key, a, b in pairs
            if a != b
        ],
    }


def report(found: Mapping[str, Any]) -> str:
    """Return the markdown of the result of :func:`summarise`."""
    times = suite.markdown_table(
        [
            "request",
            "ran",
            "refused",
            "ended",
            "first token, cold, ms",
            "(n)",
            "first token, warm, ms",
            "(n)",
            "ms per token",
            f"ratio to {_BASE}",
        ],
        [
            [
                arm,
                part["ran"],
                part["refused"],
                suite.show_share(part["complete"]),
                suite.show_quantiles(part["cold_first_ms"]),
                part["cold_first_ms"]["n"],
                suite.show_quantiles(part["warm_first_ms"]),
                part["warm_first_ms"]["n"],
                suite.show_quantiles(part["token_ms"], 1),
                suite.show_mean(part["token_ratio"]),
            ]
            for arm, part in found["arms"].items()
        ],
    )
    equal = suite.markdown_table(
        ["greedy texts", "same tokens", "tokens compared"],
        [
            [pair, suite.show_share(part), part["tokens"]]
            for pair, part in found["greedy_equal"].items()
        ],
    )
    return f"{times}\n{equal}"


def main(
    data: Annotated[Path, typer.Option(help="JSONL of rows with id and schema.")],
    model: Annotated[str, typer.Option(help="A folder or Hugging Face name.")],
    out: Annotated[Path, typer.Option(help="Results, without suffix.")] = Path("build/json_engine"),
    schemas: Annotated[int, typer.Option(min=1, help="Spread evenly over the rows.")] = 30,
    max_tokens: Annotated[int, typer.Option(min=8, help="Of a text, its end included.")] = 48,
    dtype: Annotated[str, typer.Option()] = "float32",
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Report the journal of a run that was cut off.")
    ] = False,
) -> None:
    """Time JSON schemas in vLLM's structured outputs and in ours, and compare greedy texts."""
    settings = {"model": Path(model).name, "dtype": dtype, "max_tokens": max_tokens}
    journal = suite.Journal(out.with_suffix(".journal.jsonl"), settings)
    chosen = choose(suite.read_rows(data), schemas)
    missing = [row for row in chosen if row["id"] not in journal]
    if missing and not report_only:
        tokenizer, _ = suite.load_vocabulary(model)
        engines = {
            backend: suite.open_engine(
                model,
                dtype=dtype,
                max_model_len=2048,
                max_num_seqs=1,
                line_ends_text=False,
                structured_outputs_config={"backend": backend},
            )
            for backend in BACKENDS
        }
        arms = list(ARMS)
        with suite.progress_bar("schemas", len(missing)) as (bar, bar_task):
            for row in missing:
                turn = [{"role": "user", "content": _PROMPT % json.dumps(row["schema"])}]
                text = tokenizer.apply_chat_template(
                    turn, add_generation_prompt=True, tokenize=False
                )
                prompt = tokenizer.encode(text, add_special_tokens=False)
                first = chosen.index(row) % len(arms)
                order = arms[first:] + arms[:first]
                journal.add(row["id"], ask(engines, row, prompt, max_tokens, order))
                bar.advance(bar_task)
        for engine in engines.values():
            engine.llm_engine.engine_core.shutdown()  # vLLM may wait for them forever otherwise
    entries = [journal.entries[row["id"]] for row in chosen if row["id"] in journal]
    found = summarise(entries)
    result = {
        "environment": suite.environment(model, dtype),
        "settings": settings | {"schemas": len(entries)},
        **found,
    }
    body = (
        f"{len(entries)} schemas of at most {_LONGEST_SCHEMA} characters, chat prompts, one "
        f"request at a time, at most {max_tokens} tokens, one greedy and one at T=1 per way of "
        "asking, in turns; a request of ours names its kind of constraint and its method. Times "
        "are wall-clock, median / 90th percentile over requests, the model's own time included; "
        f"the ratio is that of times per token on the same schema (texts of at least "
        f"{_TOKENS_TO_TIME} tokens), mean with a 95% bootstrap interval. Greedy texts are compared "
        f"on the schemas that both took.\n\n{report(found)}"
    )
    suite.write_report(out, result, "JSON schemas in the engine", body)


if __name__ == "__main__":
    typer.run(main)
