# SPDX-License-Identifier: Apache-2.0
import json
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_ext import hooks
from vllm_ext.cli import app
from vllm_ext.hooks import HookReport

GOOD = HookReport("sample", "m:f", True, "present", "the walk")
BAD = HookReport("propose", "m:g", False, "m:g is gone", "the drafter")


def doctor(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_without_vllm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m == "vllm" or m.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", None)  # import vllm raises ImportError
    result = doctor()
    assert result.exit_code == 1
    assert 'pip install "vllm-ext[cpu]"' in result.stdout
    assert "vllm-ext[cuda]" in result.stdout
    assert json.loads(doctor("--json").stdout)["ok"] is False


@pytest.mark.parametrize(("reports", "code"), [([GOOD], 0), ([GOOD, BAD], 1)])
def test_the_exit_code_tells_whether_every_hook_is_there(
    monkeypatch: pytest.MonkeyPatch, reports: list[HookReport], code: int
) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setattr(hooks, "check", lambda: reports)
    result = doctor()
    assert result.exit_code == code
    assert "PASS  hook sample" in result.stdout
    assert ("FAIL  hook propose" in result.stdout) == (code == 1)
    assert ("m:g is gone (needed: the drafter)" in result.stdout) == (code == 1)


def test_the_installed_vllm_passes() -> None:
    pytest.importorskip("vllm")
    result = doctor("--json")
    diagnosis = json.loads(result.stdout)
    assert [c for c in diagnosis["checks"] if not c["ok"]] == []
    assert result.exit_code == 0
    assert "vllm_ext" in diagnosis["entry_points"]["vllm.general_plugins"]


def test_a_forced_model_runner_and_a_disabled_plugin_are_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setenv("VLLM_EXT_DISABLE", "1")
    text = doctor().stdout
    assert "unset it" in text
    assert "as if this plugin were not installed" in text
