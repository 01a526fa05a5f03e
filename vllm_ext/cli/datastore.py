# SPDX-License-Identifier: Apache-2.0
"""``vllm-ext datastore``: build and inspect the corpora that drafts are retrieved from."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from vllm_ext.cli import engines
from vllm_ext.cli.options import Model
from vllm_ext.cli.progress import progress

Folder = Annotated[Path, typer.Argument(help="Folder of a datastore.", file_okay=False)]

app = typer.Typer(help="Corpora that drafts are retrieved from.", no_args_is_help=True)


@app.command("build")
def build_command(
    model: Model,
    inputs: Annotated[
        list[Path],
        typer.Option("--input", help="Text or .jsonl file; give the option once per file."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    field: Annotated[str, typer.Option(help="Key of the text in JSON lines.")] = "text",
    more: Annotated[list[Path] | None, typer.Argument(help="More input files.")] = None,
) -> None:
    """Tokenize files with MODEL's tokenizer and index them; an interrupted build goes on."""
    from proposers.datastore import DatastoreError
    from proposers.datastore_build import build
    from vllm_ext.identity import IdentityError, local_folder, tokenizer_hash

    files = [*inputs, *(more or ())]
    begin = time.monotonic()
    try:
        folder = local_folder(engines.model_argument(model))
        tokenizer = _tokenizer(folder)
        identity = tokenizer_hash(folder)
        total = sum(path.stat().st_size for path in files)
        with progress("indexing", total=total) as advance:
            header = build(
                files,
                out,
                encode=lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"],
                tokenizer=identity,
                vocab_size=len(tokenizer),
                field=field,
                advance=advance,
            )
    except (DatastoreError, IdentityError, OSError) as error:
        _fail(error)
    typer.echo(
        f"{out}: {header.tokens} tokens of {header.documents} documents in "
        f"{time.monotonic() - begin:.1f} s"
    )


@app.command("info")
def info_command(folder: Folder) -> None:
    """Check a datastore and say what it holds."""
    store = _open(folder, None)
    header = store.header
    for name, value in (
        ("tokens", header.tokens),
        ("documents", header.documents),
        ("vocabulary", header.vocab_size),
        ("tokenizer", header.tokenizer),
        ("bytes", header.tokens * (header.width + header.index_width)),
    ):
        typer.echo(f"{name:<11} {value}")


@app.command("query")
def query_command(
    folder: Folder,
    model: Model,
    text: Annotated[str, typer.Argument(help="What the corpus should hold.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens shown of each occurrence.")] = 16,
    most: Annotated[int, typer.Option(min=1, help="Occurrences shown.")] = 5,
) -> None:
    """How often TEXT occurs, and how it goes on."""
    from vllm_ext.identity import IdentityError, local_folder, tokenizer_hash

    try:
        source = local_folder(engines.model_argument(model))
        tokenizer = _tokenizer(source)
        store = _open(folder, tokenizer_hash(source))
    except IdentityError as error:
        _fail(error)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pattern = store.encode(ids)
    low, high = store.find(pattern, 0, len(store)) if pattern else (0, 0)
    typer.echo(f"{high - low} occurrences of {len(ids)} tokens")
    for i in range(low, min(high, low + most)):
        found = store.text(store.position(i) + len(ids), tokens)
        typer.echo(f"  ...{tokenizer.decode(found)!r}")


def _open(folder: Path, tokenizer: str | None) -> Any:
    from proposers.datastore import Datastore, DatastoreError

    try:
        return Datastore(folder, tokenizer)
    except DatastoreError as error:
        _fail(error)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _fail(error: Exception) -> NoReturn:
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(1) from error
