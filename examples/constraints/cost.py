# SPDX-License-Identifier: Apache-2.0
"""What constraints cost per step, and what the processor costs those who do not use it.

Three engines stand side by side: one as installed, and two for which the entry point of our logits
processor is hidden. They take turns on the same prompts; the two equal ones are the control, which
shows how far apart engines measure for no reason. That is more than an idle processor costs, so
within the first engine, too, the processor is taken out and put back in turns, with turns in which
nothing changes as the control. There, constrained requests take turns with plain ones. A token is
timed by the wall clock of a whole batch over its steps, so scheduling, tokenization of the answer
and Python are in it.

::

    python examples/constraints/cost.py --model MODEL --out docs/results/constraints/cost
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import distribution
from itertools import count
from pathlib import Path
from typing import Any

import suite

LETTERS = "[A-Za-z ,.]{400,}"
SCHEMA = (
    '{"type": "object", "properties": {"story": {"type": "string", "minLength": 400}}, '
    '"required": ["story"]}'
)
ANY = r"[\s\S]{400,}"
"""For CARS: a text that leaves the language is given up, and there are no steps left to time."""
PROMPT = "Write a long story about a small town by the sea."
CASES: dict[str, dict[str, Any]] = {
    "regex, masking": {"constraint_regex": LETTERS, "constraint_method": "masking"},
    "regex, AWRS": {"constraint_regex": LETTERS},
    "regex, ASAp": {"constraint_regex": LETTERS, "constraint_method": "asap"},
    "JSON schema, masking": {"constraint_json_schema": SCHEMA, "constraint_method": "masking"},
    "JSON schema, AWRS": {"constraint_json_schema": SCHEMA},
    "regex with look-around, AWRS": {"constraint_regex_partial": r"(?!Once)[A-Za-z ,.]{400,}"},
    "predicate, AWRS": {"constraint_predicate": "letters"},
    "JSON validator, AWRS": {"constraint_json_validate": SCHEMA},
    "any text, CARS": {"constraint_regex": ANY, "constraint_method": "cars"},
    "Mirostat 1": {"mirostat_version": 1},
    "Mirostat 2": {"mirostat_version": 2},
    "Momentum": {"momentum_alpha": 0.4},
}

_CALLS = 20_000
_PROMPTS = count(1)
_TRIES = 20
_WITHIN = 4  # times as many rounds, for a smaller difference


class Letters:
    """The language of ``LETTERS`` as a Python predicate."""

    def __init__(self, argument: str) -> None:
        del argument

    def prefix(self, text: str) -> bool:
        """Tell whether ``text`` may become valid."""
        return all(c.isascii() and (c.isalpha() or c in " ,.") for c in text)

    def complete(self, text: str) -> bool:
        """Tell whether ``text`` is valid."""
        return len(text) >= 400 and self.prefix(text)


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # a function is sent to our own worker
    with _offered() as folder:
        full = _engine(args, hidden=None)
        bare, control = _engine(args, hidden=folder), _engine(args, hidden=folder)
        idle = [_idle(bare, full, control, batch, args) for batch in args.batch]
        within = [_within(full, batch, args) for batch in args.batch]
        (call,) = full.collective_rpc(_seconds_of_a_call)
        costs = [
            _cost(full, name, keys, batch, args)
            for batch in args.batch
            for name, keys in CASES.items()
            if name in args.cases
        ]
        for engine in (full, bare, control):
            engine.llm_engine.engine_core.shutdown()  # vLLM may wait for them forever otherwise
    environment = suite.environment(args.model, args.dtype)
    result = {
        "environment": environment,
        "rounds": args.rounds,
        "idle": idle,
        "within": within,
        "idle_call_us": 1e6 * call,
        "costs": costs,
    }
    suite.write_report(args.out, result, "Cost of constraints", _text(result, args))


@contextmanager
def _offered() -> Iterator[Path]:
    """Install the predicate; yield a folder that hides our processor when put before it."""
    with tempfile.TemporaryDirectory() as offered, tempfile.TemporaryDirectory() as hidden:
        info = Path(offered) / "vllm_ext_cost-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-ext-cost\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[vllm_ext.predicates]\nletters = cost:Letters\n")
        ours = distribution("vllm-ext")
        info = Path(hidden) / "vllm_ext-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: vllm-ext\nVersion: {ours.version}\n"
        )
        (info / "entry_points.txt").write_text("")
        _put_first(offered)
        _put_first(str(Path(__file__).parent))
        yield Path(hidden)


def _put_first(folder: str) -> None:
    """Let this process and those it starts find ``folder`` first."""
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])


def _engine(args: argparse.Namespace, hidden: Path | None) -> Any:
    """Start an engine, without our processor if it is to be hidden."""
    from vllm import LLM

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    path, variable = list(sys.path), os.environ.get("PYTHONPATH", "")
    if hidden is not None:
        _put_first(str(hidden))
    try:
        return LLM(
            args.model,
            dtype=args.dtype,
            enforce_eager=True,
            max_model_len=512,
            disable_log_stats=True,
        )
    finally:
        sys.path[:] = path
        os.environ["PYTHONPATH"] = variable


def _timed(
    engine: Any,
    batch: int,
    keys: dict[str, Any] | None,
    args: argparse.Namespace,
    cars: bool = False,
) -> float:
    """Return the seconds per step of one batch.

    With ``cars`` its law and prompt are such that CARS hardly ever gives up a text: without tokens
    that end it, and with a prompt about which nothing has been learnt. Where it does all the same
    (bytes that are no text), another prompt is tried.

    Raises:
        RuntimeError: a text ended early, so that steps cannot be told from the wall clock.
    """
    for _ in range(_TRIES if cars else 1):
        seconds, lengths = _run(engine, batch, keys, args, cars)
        if lengths == {args.max_tokens}:
            return seconds / args.max_tokens
    raise RuntimeError(f"texts of {lengths} tokens, wanted {args.max_tokens} each ({keys})")


def _run(
    engine: Any, batch: int, keys: dict[str, Any] | None, args: argparse.Namespace, cars: bool
) -> tuple[float, set[int]]:
    """Return the seconds that a batch took, and the lengths of its texts."""
    from vllm import SamplingParams

    prompt = f"{PROMPT} ({next(_PROMPTS)})" if cars else PROMPT
    special = engine.get_tokenizer().all_special_ids
    each = [
        SamplingParams(
            temperature=1.0,
            seed=seed,
            max_tokens=args.max_tokens,
            ignore_eos=not any(key.startswith("constraint_") for key in keys or ()),
            logit_bias=dict.fromkeys(special, -100.0) if cars else None,
            extra_args=keys,
        )
        for seed in range(batch)
    ]
    begin = time.perf_counter()
    outputs = engine.generate([prompt] * batch, each, use_tqdm=False)
    seconds = time.perf_counter() - begin
    return seconds, {len(output.outputs[0].token_ids) for output in outputs}


def _alternate(measures: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Measure things in turns, each round in another order; the first round does not count."""
    found: list[list[float]] = [[] for _ in measures]
    for i in range(rounds + 1):
        turn = [(i + j) % len(measures) for j in range(len(measures))]
        for j in turn if i % 2 else reversed(turn):
            found[j].append(measures[j]())
    return [values[1:] for values in found]


def _idle(
    bare: Any, full: Any, control: Any, batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    engines = (bare, full, control)
    without, having, again = _alternate(
        [partial(_timed, engine, batch, None, args) for engine in engines], args.rounds
    )
    return {
        "batch": batch,
        **_compare(without, having),
        "control": _compare(without, again),
        "ratio_to_both": suite.mean_spread(
            [2 * b / (a + c) for a, b, c in zip(without, having, again, strict=True)]
        ),
    }


def _within(engine: Any, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    def measure(present: bool) -> float:
        engine.collective_rpc(_put_processor, args=(present,))
        return _timed(engine, batch, None, args)

    measures = [partial(measure, present) for present in (False, True, True)]
    without, having, again = _alternate(measures, _WITHIN * args.rounds)
    engine.collective_rpc(_put_processor, args=(True,))
    return {"batch": batch, **_compare(without, having), "control": _compare(having, again)}


def _seconds_of_a_call(worker: Any) -> float:
    """What a step asks of the idle processor, timed alone."""
    import torch

    from logits_processors.vllm_v1 import V1Processor

    processors = worker.model_runner.input_batch.logitsprocs.non_argmax_invariant
    (ours,) = (p for p in processors if isinstance(p, V1Processor))
    logits = torch.zeros(8, 16)
    begin = time.perf_counter()
    for _ in range(_CALLS):
        ours.update_state(None)
        ours.apply(logits)
    return float(time.perf_counter() - begin) / _CALLS


def _put_processor(worker: Any, present: bool) -> None:
    """Take our processor out of a worker's list, or put it back."""
    from logits_processors.vllm_v1 import V1Processor

    runner = worker.model_runner
    processors = runner.input_batch.logitsprocs.non_argmax_invariant
    ours = [p for p in processors if isinstance(p, V1Processor)]
    if present and not ours:
        processors.append(runner.ours_taken_out)
    elif not present and ours:
        (runner.ours_taken_out,) = ours
        processors.remove(runner.ours_taken_out)


def _cost(
    engine: Any, name: str, keys: dict[str, Any], batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    cars = keys.get("constraint_method") == "cars"
    plain, constrained = _alternate(
        [partial(_timed, engine, batch, asked, args, cars) for asked in (None, keys)], args.rounds
    )
    return {"case": name, "batch": batch, **_compare(plain, constrained)}


def _compare(base: list[float], other: list[float]) -> dict[str, Any]:
    return {
        "base_ms": statistics.median(base) * 1e3,
        "ms": statistics.median(other) * 1e3,
        "ratio": suite.mean_spread([b / a for a, b in zip(base, other, strict=True)]),
        "extra_ms": suite.mean_spread([(b - a) * 1e3 for a, b in zip(base, other, strict=True)]),
    }


def _text(result: dict[str, Any], args: argparse.Namespace) -> str:
    idle = suite.markdown_table(
        [
            "batch",
            "step without it, ms",
            "step with it idle, ms",
            "ratio (mean, 95%)",
            "control: a second engine without it, ratio",
            "ratio to the mean of both without it",
        ],
        [
            [
                r["batch"],
                f"{r['base_ms']:.2f}",
                f"{r['ms']:.2f}",
                suite.show_mean(r["ratio"], 3),
                suite.show_mean(r["control"]["ratio"], 3),
                suite.show_mean(r["ratio_to_both"], 3),
            ]
            for r in result["idle"]
        ],
    )
    within = suite.markdown_table(
        [
            "batch",
            "step with it taken out, ms",
            "step with it idle, ms",
            "ratio (mean, 95%)",
            "control: idle against idle, ratio",
        ],
        [
            [
                r["batch"],
                f"{r['base_ms']:.2f}",
                f"{r['ms']:.2f}",
                suite.show_mean(r["ratio"], 3),
                suite.show_mean(r["control"]["ratio"], 3),
            ]
            for r in result["within"]
        ],
    )
    costs = suite.markdown_table(
        ["case", "batch", "plain step, ms", "constrained step, ms", "extra ms per step", "ratio"],
        [
            [
                r["case"],
                r["batch"],
                f"{r['base_ms']:.2f}",
                f"{r['ms']:.2f}",
                suite.show_mean(r["extra_ms"]),
                suite.show_mean(r["ratio"], 3),
            ]
            for r in result["costs"]
        ],
    )
    rounds = (
        f"{args.rounds} rounds in turns"
        if args.rounds > 1
        else "One round, so that nothing is known of the spread"
    )
    return (
        f"{rounds}, {args.max_tokens} tokens per text, all rows of the batch constrained; medians "
        "of steps, means of paired ratios with 95% bootstrap intervals where there are more than "
        "one. CARS is timed where it does not give up a text; what restarts cost depends on the "
        "constraint.\n\n"
        f"## The processor, not used\n\nThree engines:\n\n{idle}\n"
        f"One engine, {_WITHIN * args.rounds} rounds:\n\n{within}\n"
        f"All that a step asks of the idle processor, timed alone: {result['idle_call_us']:.1f} "
        f"microseconds (mean of {_CALLS} calls).\n\n"
        f"## Constrained requests\n\n{costs}"
    )


if __name__ == "__main__":
    main()
