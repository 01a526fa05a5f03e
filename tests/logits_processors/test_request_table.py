# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

from logits_processors.request import table


def test_the_documentation_lists_every_key() -> None:
    page = Path(__file__).parents[2] / "docs" / "constraints.md"
    lines = page.read_text(encoding="utf-8").splitlines()
    start = lines.index("| key | type | default | meaning |") + 2
    expected = ["| `{}` | {} | {} | {} |".format(*row) for row in table()]
    assert lines[start : start + len(expected)] == expected
    assert lines[start + len(expected)] == ""
