# SPDX-License-Identifier: Apache-2.0
"""Progress bars on standard error, so that standard output holds only results."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Advance = Callable[[int, str], None]


@contextlib.contextmanager
def progress(description: str, total: int) -> Iterator[Advance]:
    """A bar of `total` steps; the yielded function adds steps and shows what is being done."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[doing]}"),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task(description, total=total, doing="")

        def advance(steps: int, doing: str) -> None:
            bar.update(task, advance=steps, doing=doing)

        yield advance


def whole_seconds(advance: Advance) -> Callable[[float, str], None]:
    """For a bar that counts whole seconds: takes fractions, which wait."""
    spent = shown = 0.0

    def more(seconds: float, doing: str) -> None:
        nonlocal spent, shown
        spent += seconds
        step = int(spent - shown)
        shown += step
        advance(step, doing)

    return more
