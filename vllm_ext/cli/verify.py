# SPDX-License-Identifier: Apache-2.0
"""``vllm-ext verify``: does the method change a single token on the user's model and prompts?"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_ext.cli import engines, environment, options
from vllm_ext.cli.arms import NONE, Arm, ArmError, parse_arms
from vllm_ext.cli.compare import TIE_GAP, verdict
from vllm_ext.cli.engine_process import EngineProcess
from vllm_ext.cli.engine_types import EngineError
from vllm_ext.cli.model_file import cached_files
from vllm_ext.cli.presets import Preset, PresetError, describe_presets, parse_presets
from vllm_ext.cli.progress import progress
from vllm_ext.cli.prompts import (
    EncodedPrompt,
    Prompt,
    PromptFileError,
    fitting,
    load_prompts,
)
from vllm_ext.cli.verify_run import Answers, CellReport, answer, report, top2_gap

if TYPE_CHECKING:
    from rich.table import Table

EPILOG = "Sampling presets:\n\n" + "\n\n".join(describe_presets())


@dataclass(frozen=True)
class Settings:
    """A verification as asked for: `method` first, `reference` last among the `arms`."""

    model: str
    arms: Sequence[Arm]
    presets: Mapping[str, Preset]
    batches: Sequence[int]
    max_tokens: int = 128
    dtype: str = "float32"
    max_model_len: int = 2048
    eager: bool | None = None
    raw: bool = False


def command(
    model: options.Model,
    prompts: options.Prompts,
    json_path: options.JsonPath,
    method: Annotated[
        str, typer.Option(help="Method to verify, or an arm named with --arm-config.")
    ] = "dyspec",
    reference: Annotated[str, typer.Option(help="The arm it is compared to.")] = NONE,
    beside: Annotated[
        str,
        typer.Option(
            help="Comma-separated arms compared to the reference as well, for their mismatch "
            "rates, e.g. ngram. They do not count for the verdict."
        ),
    ] = "",
    arm_config: options.ArmConfig = None,
    draft: options.Draft = None,
    sampling: Annotated[
        str, typer.Option(help="Comma-separated sampling presets (listed below), or all.")
    ] = "greedy,seeded",
    batch: Annotated[
        str,
        typer.Option(
            help="Comma-separated batch sizes. At the largest, if above 1, all prompts are sent "
            "at once and requests join and leave the running batch."
        ),
    ] = "1,8",
    max_tokens: options.MaxTokens = 128,
    limit: options.Limit = None,
    raw: options.Raw = False,
    dtype: Annotated[
        str,
        typer.Option(
            help="Data type. Judge identity in float32: in bfloat16 vLLM's own answers depend on "
            "the shape of the batch."
        ),
    ] = "float32",
    max_model_len: options.MaxModelLen = 2048,
    eager: options.Eager = None,
) -> None:
    """Compare a method's answers with plain vLLM's, token by token.

    Exit code 0: identical (in float32, differences between tokens whose logits are closer than
    1e-4 are listed as ties and excused). 1: a difference, a refused request, or no draft at all,
    which would prove nothing. 2: wrong usage.
    """
    try:
        others = [name.strip() for name in beside.split(",") if name.strip()]
        settings = Settings(
            model=model,
            arms=parse_arms(",".join([method, *others, reference]), arm_config or (), draft),
            presets=parse_presets(sampling),
            batches=options.parse_batches(batch),
            max_tokens=max_tokens,
            dtype=dtype,
            max_model_len=max_model_len,
            eager=eager,
            raw=raw,
        )
        rows = load_prompts(prompts, limit)
        engines.require_vllm()
        engines.require_peers(arm.speculative_config for arm in settings.arms)
        result = verify(settings, rows)
    except (ArmError, PresetError, PromptFileError) as error:
        raise typer.BadParameter(str(error)) from error
    except EngineError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    json_path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    _print(result)
    typer.echo(f"written: {json_path}")
    raise typer.Exit(0 if result["passed"] else 1)


def verify(settings: Settings, rows: Sequence[Prompt]) -> dict[str, Any]:
    """Run a verification and return its result as plain JSON types.

    Raises:
        EngineError: An engine did not start or died.
        PromptFileError: No prompt leaves room for the answer.
    """
    cuda = environment.has_cuda()
    llm = engines.llm_options(
        model=settings.model,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        eager=settings.eager,
        cuda=cuda,
        seeded=any(preset.seeded for preset in settings.presets.values()),
    ) | {"max_num_seqs": max(settings.batches)}
    # The two model runners of vLLM draw random numbers differently: compare within one.
    env = engines.engine_env(cuda=cuda) | {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    before = environment.describe()
    prompts: list[EncodedPrompt] = []
    model_files: dict[str, str] = {}
    answers: dict[str, Answers] = {}
    reports: dict[str, list[CellReport]] = {}
    *compared, reference = settings.arms
    for arm in settings.arms:
        with EngineProcess(arm.engine_config(llm, env)) as engine:
            if not prompts:
                model_files = cached_files(settings.model)
                token_ids = engine.encode([row.content for row in rows], raw=settings.raw)
                prompts = fitting(rows, token_ids, settings.max_model_len - settings.max_tokens)
            answers[arm.name] = _answer_with_bar(engine, arm.name, prompts, settings)
            if arm is reference:
                gap_at = functools.partial(top2_gap, engine)
                for other in compared:
                    reports[other.name] = report(
                        answers[reference.name], answers[other.name], prompts, gap_at
                    )
    return {
        "environment": before,
        "settings": {
            "llm": llm,
            "engine_environment": env,
            "speculative_config": {arm.name: arm.speculative_config for arm in settings.arms},
            "model_files": model_files,
            "chat_template": not settings.raw,
            "max_tokens": settings.max_tokens,
            "batches": list(settings.batches),
            "sampling": {name: preset.kwargs for name, preset in settings.presets.items()},
            "prompts": len(prompts),
            "prompts_too_long": len(rows) - len(prompts),
        },
        **judge(compared[0], reports[compared[0].name], excuse_ties=settings.dtype == "float32"),
        "compared": {name: [c.as_dict() for c in cells] for name, cells in reports.items()},
        "mismatches": {
            name: [m.as_dict() for c in cells for m in c.mismatches]
            for name, cells in reports.items()
        },
    }


def judge(method: Arm, cells: Sequence[CellReport], *, excuse_ties: bool) -> dict[str, Any]:
    """The verdict on `method`: "passed", and the "problems" that stand against it."""
    problems = []
    for cell in cells:
        where = f"{cell.sampling} at batch {cell.batch}"
        if cell.refused is not None:
            problems.append(f"{where}: refused ({cell.refused})")
        elif not verdict(cell.mismatches, excuse_ties=excuse_ties):
            different = cell.as_dict()["different_requests"]
            problems.append(f"{where}: {different} of {cell.requests} answers differ")
    if method.speculative_config is not None and not any(cell.draft_tokens for cell in cells):
        problems.append("no token was ever drafted: the comparison proves nothing")
    return {"method": method.name, "passed": not problems, "problems": problems}


def _answer_with_bar(
    engine: EngineProcess, name: str, prompts: Sequence[EncodedPrompt], settings: Settings
) -> Answers:
    total = len(prompts) * len(settings.presets) * len(settings.batches)
    with progress(name, total) as advance:
        return answer(
            engine, prompts, settings.presets, settings.batches, settings.max_tokens, advance
        )


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    console.print(_table(result))
    for mismatch in result["mismatches"][result["method"]]:
        console.print(_line(mismatch), highlight=False)
    for problem in result["problems"]:
        console.print(f"[red]FAIL[/red] {problem}")
    cells = result["compared"][result["method"]]
    drafted, accepted, ties = (
        sum(cell[key] for cell in cells) for key in ("draft_tokens", "accepted_tokens", "ties")
    )
    if result["passed"]:
        excused = f", but for {ties} ties" if ties else ""
        console.print(f"[green]PASS[/green] identical to the reference{excused}")
    elif result["settings"]["llm"]["dtype"] != "float32":
        console.print("Identity is judged in float32: below it, vLLM differs from itself too.")
    console.print(f"{accepted} of {drafted} drafted tokens were accepted")


def _table(result: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title="Answers that differ from the reference")
    table.add_column("sampling")
    for header in ("batch", "requests", "tokens", *result["compared"]):
        table.add_column(header, justify="right")
    for cells in zip(*result["compared"].values(), strict=True):
        first = cells[0]
        counts = [str(first[key]) for key in ("batch", "requests", "tokens")]
        table.add_row(first["sampling"], *counts, *map(_cell, cells))
    return table


def _cell(cell: dict[str, Any]) -> str:
    if cell["refused"] is not None:
        return "refused"
    ties = f" ({cell['ties']} ties)" if cell["ties"] else ""
    return f"{cell['different_requests']} = {cell['rate']:.1%}{ties}"


def _line(m: dict[str, Any]) -> str:
    gap = "" if m["gap"] is None else f", top-2 logit gap {m['gap']:.2e}"
    tie = f" (a tie: below {TIE_GAP:g})" if m["tie"] else ""
    return (
        f"{m['sampling']} batch {m['batch']} prompt {m['prompt']} sequence {m['sequence']}: "
        f"{m['kind']} differs at position {m['position']}, reference {m['reference_token']}, "
        f"method {m['token']}{gap}{tie}"
    )
