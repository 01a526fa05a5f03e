# SPDX-License-Identifier: Apache-2.0
"""Command line options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="Model: a folder or a Hugging Face name.")]
Prompts = Annotated[
    Path,
    typer.Option(
        help="JSON lines with 'prompt', 'messages' or 'turns' (the first turn is used); "
        "'task' or 'category' names the row's task.",
        exists=True,
        dir_okay=False,
    ),
]
PromptFiles = Annotated[
    list[Path],
    typer.Option(
        "--prompts",
        help="JSON lines with 'prompt', 'messages' or 'turns' (the first turn is used); 'task' or "
        "'category' names the row's task, else its file or folder does. May be given several "
        "times.",
        exists=True,
        dir_okay=False,
    ),
]
JsonPath = Annotated[Path, typer.Option("--json", help="Where the result is written.")]
ArmConfig = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=JSON: speculative_config of the arm NAME, merged over its defaults. May be "
        "given several times."
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(help="Draft model of the arms that use one: NAME+model, draft_model."),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens generated per prompt.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only the first prompts of each file.")]
Sample = Annotated[
    int | None, typer.Option(min=1, help="Use only so many prompts of each file, evenly spaced.")
]
Raw = Annotated[bool, typer.Option("--raw", help="No chat template around texts.")]
MaxModelLen = Annotated[
    int, typer.Option(min=2, help="Most tokens of prompt and answer; longer rows are left out.")
]
Eager = Annotated[
    bool | None,
    typer.Option(
        "--eager/--compiled",
        help="Without or with vLLM's compilation.  [default: eager on a CPU, compiled on a GPU]",
    ),
]


def parse_batches(text: str) -> list[int]:
    """Batch sizes from a comma-separated list of different positive numbers.

    Raises:
        typer.BadParameter: It is anything else.
    """
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1 or len(set(sizes)) != len(sizes):
        raise typer.BadParameter(
            f"batch {text!r}: give different positive numbers, separated by commas, e.g. 1,8"
        )
    return sizes
