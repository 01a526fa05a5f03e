# SPDX-License-Identifier: Apache-2.0
"""``vllm-ext bench``: how much faster than plain vLLM, on the user's model, prompts and machine."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_ext.cli import bench_report, engines, environment, options
from vllm_ext.cli.arms import NONE, Arm, ArmError, parse_arms
from vllm_ext.cli.bench_run import WARM_UP_TEXT, Plan, count_measurements, require_enough, run
from vllm_ext.cli.engine_process import EngineProcess
from vllm_ext.cli.engine_types import EngineError
from vllm_ext.cli.model_file import cached_files
from vllm_ext.cli.progress import progress
from vllm_ext.cli.prompts import EncodedPrompt, Prompt, PromptFileError, fitting, load_datasets
from vllm_ext.cli.served_engine import ServedEngine
from vllm_ext.cli.server_process import exit_on_sigterm


@dataclass(frozen=True)
class Settings:
    """A benchmark as asked for; `max_model_len` bounds prompt plus generated tokens.

    With `server`, every arm is a `vllm serve` and a batch is so many requests at once.
    """

    model: str
    arms: Sequence[Arm]
    plan: Plan
    dtype: str = "bfloat16"
    max_model_len: int = 2048
    eager: bool | None = None
    prefix_caching: bool = False
    raw: bool = False
    server: bool = False
    llm: dict[str, Any] = field(init=False)
    env: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        """Derive what every engine is started with."""
        cuda = environment.has_cuda()
        object.__setattr__(self, "env", engines.engine_env(cuda=cuda))
        object.__setattr__(
            self,
            "llm",
            engines.llm_options(
                model=self.model,
                dtype=self.dtype,
                max_model_len=self.max_model_len,
                eager=self.eager,
                cuda=cuda,
                num_engines=len(self.arms),
                prefix_caching=self.prefix_caching,
                seeded=self.plan.temperature > 0,
            ),
        )


def command(
    model: options.Model,
    prompts: options.PromptFiles,
    json_path: options.JsonPath,
    arms: Annotated[
        str,
        typer.Option(
            help="Comma-separated: none, methods of vLLM (ngram, suffix, ...), methods of this "
            "package (see `vllm-ext methods`; with --draft also NAME+model), names defined with "
            "--arm-config."
        ),
    ] = "none,ngram,dyspec",
    arm_config: options.ArmConfig = None,
    draft: options.Draft = None,
    server: Annotated[
        bool,
        typer.Option(
            "--server",
            help="Measure `vllm serve` over HTTP, streaming, instead of offline engines; times are "
            "those of the client.",
        ),
    ] = False,
    batch: Annotated[
        str, typer.Option(help="Comma-separated batch sizes: requests sent at once (concurrency).")
    ] = "1",
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Give every batch size prompts of its own, an equal share of all; otherwise "
            "drafters that learn have seen them at the size before.",
        ),
    ] = False,
    max_tokens: options.MaxTokens = 128,
    repeat: Annotated[
        int,
        typer.Option(
            min=1, help="Rounds over all prompts. Drafters that learn have seen them after one."
        ),
    ] = 1,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            help="Start all engines anew before every further round: two engines of one "
            "configuration differ by some percent, which more prompts do not average out.",
        ),
    ] = False,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 is greedy; above, every request has a seed.")
    ] = 0.0,
    limit: options.Limit = None,
    sample: options.Sample = None,
    raw: options.Raw = False,
    dtype: Annotated[str, typer.Option(help="Data type of weights and KV cache.")] = "bfloat16",
    max_model_len: options.MaxModelLen = 2048,
    eager: options.Eager = None,
    prefix_caching: Annotated[
        bool,
        typer.Option(
            "--prefix-caching", help="Leave vLLM's prefix cache on: repeated prompts get cheaper."
        ),
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw the ratios to this image.")] = None,
) -> None:
    """Measure methods against plain vLLM: all arms take turns on the same prompts in one run."""
    if limit is not None and sample is not None:
        raise typer.BadParameter("give --limit (the first prompts) or --sample (evenly), not both")
    if restart and repeat == 1:
        raise typer.BadParameter("--restart starts engines anew between rounds; give --repeat 2, 3")
    try:
        settings = Settings(
            model=model,
            arms=_with_baseline(parse_arms(arms, arm_config or (), draft)),
            plan=Plan(
                options.parse_batches(batch), repeat, max_tokens, temperature, fresh, restart
            ),
            dtype=dtype,
            max_model_len=max_model_len,
            eager=eager,
            prefix_caching=prefix_caching,
            raw=raw,
            server=server,
        )
        rows = load_datasets(prompts, limit, sample)
        require_enough(len(rows), settings.plan)  # now, and not when the engines have started
    except (ArmError, PromptFileError) as error:
        raise typer.BadParameter(str(error)) from error
    engines.require_vllm()
    engines.require_peers(arm.speculative_config for arm in settings.arms)
    engines.require_bench_extra("scipy", *(["matplotlib"] if plot else []))
    try:
        with exit_on_sigterm():
            result = measure(settings, rows)
    except PromptFileError as error:
        raise typer.BadParameter(str(error)) from error
    except EngineError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    json_path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print_tables(result)
    typer.echo(f"written: {json_path}")
    if plot is not None:
        bench_report.plot(result["arms"], plot)
        typer.echo(f"written: {plot}")


def measure(settings: Settings, rows: Sequence[Prompt]) -> dict[str, Any]:
    """Run a benchmark and return its result as plain JSON types.

    Raises:
        EngineError: An engine did not start or refused a request.
        PromptFileError: No prompt leaves room for the answer.
    """
    before = environment.describe()
    with start_engines(settings) as running:
        model_files = cached_files(settings.model)  # now: nothing may fail after the measurement
        first = next(iter(running.values()))
        token_ids = first.encode([row.content for row in rows], raw=settings.raw)
        warm_up = first.encode([WARM_UP_TEXT], raw=settings.raw)[0]
        room = settings.max_model_len - settings.plan.max_tokens
        prompts = fitting(rows, token_ids, room)
        total = count_measurements(prompts, settings.plan, len(running))
        measurements = []
        with progress("measuring", total) as advance:
            turns = functools.partial(advance, 0)
            for measurement in run(running, prompts, warm_up, settings.plan, turns):
                measurements.append(measurement)
                advance(1, measurement.arm)
    return {
        "environment": {**before, "load_average_after": environment.describe()["load_average"]},
        "settings": _describe(settings, prompts, num_rows=len(rows)) | {"model_files": model_files},
        "arms": bench_report.summarise(measurements),
    }


@contextlib.contextmanager
def start_engines(settings: Settings) -> Iterator[dict[str, EngineProcess | ServedEngine]]:
    """Engines of all arms by name, stopped together."""
    running: dict[str, EngineProcess | ServedEngine] = {}
    try:
        with progress("starting engines", len(settings.arms)) as advance:
            for arms in start_order(settings):
                names = ", ".join(arm.name for arm in arms)
                advance(0, names)
                _start(arms, settings, running)
                advance(len(arms), names)
        yield {arm.name: running[arm.name] for arm in settings.arms}
    finally:
        if running:
            with ThreadPoolExecutor(len(running)) as pool:
                list(pool.map(lambda engine: engine.close(), running.values()))


def start_order(settings: Settings) -> list[list[Arm]]:
    """Arms whose engines may start side by side, group by group.

    Engines of this package measure the machine when they start, and engines on a GPU its memory:
    these start alone. The others start as many at once as there are cores.
    """
    if settings.server or environment.has_cuda():
        return [[arm] for arm in settings.arms]
    theirs = [arm for arm in settings.arms if not arm.is_ours]
    size = os.cpu_count() or 1
    groups = [theirs[first : first + size] for first in range(0, len(theirs), size)]
    return groups + [[arm] for arm in settings.arms if arm.is_ours]


def _start(
    arms: Sequence[Arm], settings: Settings, running: dict[str, EngineProcess | ServedEngine]
) -> None:
    """Start the engines of a group and add them to `running`, ready or not."""
    for arm in arms:
        config = arm.engine_config(settings.llm, settings.env)
        with _naming(arm):
            running[arm.name] = (
                ServedEngine(config) if settings.server else EngineProcess(config, wait=False)
            )
    for arm in arms:
        engine = running[arm.name]
        if isinstance(engine, ServedEngine):
            continue
        with _naming(arm):
            engine.wait()


@contextlib.contextmanager
def _naming(arm: Arm) -> Iterator[None]:
    try:
        yield
    except EngineError as error:
        raise EngineError(f"arm {arm.name!r} did not start: {error}") from error


def print_tables(result: dict[str, Any]) -> None:
    """Print the overview and the per-task table of a result of `measure`."""
    from rich.console import Console

    console = Console()
    console.print(bench_report.overview_table(result["arms"]))
    console.print(bench_report.task_table(result["arms"]))


def _describe(
    settings: Settings, prompts: Sequence[EncodedPrompt], *, num_rows: int
) -> dict[str, Any]:
    return {
        "server": settings.server,
        "llm": settings.llm,
        "engine_environment": settings.env,
        "compiled": not settings.llm["enforce_eager"],
        "speculative_config": {arm.name: arm.speculative_config for arm in settings.arms},
        "chat_template": not settings.raw,
        "temperature": settings.plan.temperature,
        "max_tokens": settings.plan.max_tokens,
        "rounds": settings.plan.rounds,
        "engines_per_round": settings.plan.restart,
        "batches": list(settings.plan.batches),
        "fresh_prompts": settings.plan.fresh,
        "prompts": len(prompts),
        "prompts_too_long": num_rows - len(prompts),
        "datasets": dict(Counter(prompt.dataset for prompt in prompts)),
    }


def _with_baseline(arms: list[Arm]) -> list[Arm]:
    if NONE not in {arm.name for arm in arms}:
        raise ArmError("the arm 'none' is missing: every other arm is compared to it")
    return arms
