# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, Field
from typer.testing import CliRunner

from vllm_ext.cli import app
from vllm_ext.cli.methods import describe, markdown, type_name
from vllm_ext.methods import METHODS, Method

DOCS_PAGE = Path(__file__).parents[3] / "docs" / "methods.md"


class Options(BaseModel):
    nodes: int = Field(default=8, ge=1, le=64, description="most | nodes")
    decay: float = Field(default=0.5, gt=0.0, lt=1.0, description="forgetting")
    kind: Literal["a", "b"] | None = Field(default=None, description="which")
    path: str = Field(description="needed")


@pytest.fixture
def described() -> list[dict[str, object]]:
    method = Method(name="m", summary="does things", paper="P (arXiv 1)", options=Options)  # type: ignore[arg-type]
    return describe({"m": method})


def test_options_show_type_default_range_and_meaning(described: list[dict[str, object]]) -> None:
    assert described[0]["options"] == [
        {
            "name": "nodes",
            "type": "int",
            "required": False,
            "default": 8,
            "range": ">= 1, <= 64",
            "description": "most | nodes",
        },
        {
            "name": "decay",
            "type": "float",
            "required": False,
            "default": 0.5,
            "range": "> 0.0, < 1.0",
            "description": "forgetting",
        },
        {
            "name": "kind",
            "type": '"a" | "b" | None',
            "required": False,
            "default": None,
            "range": "",
            "description": "which",
        },
        {
            "name": "path",
            "type": "str",
            "required": True,
            "default": None,
            "range": "",
            "description": "needed",
        },
    ]


def test_markdown_is_a_table_with_escaped_bars(described: list[dict[str, object]]) -> None:
    page = markdown(described)
    assert "| `nodes` | int | `8` | >= 1, <= 64 | most \\| nodes |" in page
    assert "| `path` | str | required | - | needed |" in page
    assert "Does things." in page
    assert "P (arXiv 1)" in page


def test_type_names() -> None:
    assert type_name(int | None) == "int | None"
    assert type_name(list[str]) == "list[str]"
    assert type_name(dict[str, int]) == "dict[str, int]"


def test_the_docs_page_is_what_the_command_prints() -> None:
    printed = CliRunner().invoke(app, ["methods", "--markdown"])
    assert printed.exit_code == 0
    assert DOCS_PAGE.read_text(encoding="utf-8") == printed.stdout, "run `make docs`"


def test_every_real_option_is_explained() -> None:
    printed = CliRunner().invoke(app, ["methods", "--json"])
    methods = json.loads(printed.stdout)
    assert [m["name"] for m in methods] == list(METHODS)
    for method in methods:
        assert method["summary"]
        assert method["paper"]
        assert all(option["description"] for option in method["options"])


def test_two_formats_at_once_are_refused() -> None:
    assert CliRunner().invoke(app, ["methods", "--json", "--markdown"]).exit_code == 2
