# SPDX-License-Identifier: Apache-2.0
"""The result of :mod:`gad` reported again: means anew from its tasks, the environment as it was.

python examples/constraints/gad_report.py docs/results/constraints/gad.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import gad
import suite
import typer


def main(result: Annotated[Path, typer.Argument(help="JSON that gad.py has written.")]) -> None:
    """Write the JSON and its page again."""
    known = json.loads(result.read_text(encoding="utf-8"))
    known["means"] = gad.means(known["tasks"])
    suite.write_report(result.with_suffix(""), known, "Grammar-aligned decoding", gad.body(known))


if __name__ == "__main__":
    typer.run(main)
