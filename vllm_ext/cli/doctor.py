# SPDX-License-Identifier: Apache-2.0
"""``vllm-ext doctor``: is this installation sound, and if not, what is wrong with it?"""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer

from logits_processors.switch import VARIABLE, is_disabled
from vllm_ext.cli import engines, environment

ENTRY_POINT_GROUPS = ("vllm.general_plugins", "vllm.logits_processors", "vllm_ext.sources")


def command(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Print versions, platform, runner, entry points, and each hook into vLLM with PASS or FAIL.

    Exit code 0 if every check passes, else 1.
    """
    diagnosis = diagnose()
    if as_json:
        typer.echo(json.dumps(diagnosis, indent=2))
    else:
        _print(diagnosis)
    raise typer.Exit(0 if diagnosis["ok"] else 1)


def diagnose() -> dict[str, Any]:
    """All facts and checks as plain JSON types; "ok" is true if every check passed."""
    checks = [_check_vllm()]
    if checks[0]["ok"]:
        checks += [_check_plugin(), *_check_hooks()]
    return {
        "ok": all(check["ok"] for check in checks),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "versions": environment.installed_versions(),
        "platform": _platform(),
        "runner": _runner(),
        "disabled": is_disabled(),
        "entry_points": {
            group: {entry.name: entry.value for entry in entry_points(group=group)}
            for group in ENTRY_POINT_GROUPS
        },
        "checks": checks,
    }


def _check(name: str, ok: bool, reason: str, why: str = "") -> dict[str, Any]:
    return {"name": name, "ok": ok, "reason": reason, "why": why}


def _check_vllm() -> dict[str, Any]:
    try:
        import vllm
    except ImportError as error:
        return _check("vllm", False, f"{engines.INSTALL_HINT} ({error})")
    return _check("vllm", True, f"imports, version {vllm.__version__}")


def _check_plugin() -> dict[str, Any]:
    entries = {entry.name: entry.value for entry in entry_points(group="vllm.general_plugins")}
    found = "vllm_ext" in entries
    return _check(
        "entry point",
        found,
        entries["vllm_ext"] if found else "not registered: reinstall with `pip install vllm-ext`",
        "vLLM finds the plugin by it",
    )


def _check_hooks() -> list[dict[str, Any]]:
    from vllm_ext import hooks

    return [_check(f"hook {r.name}", r.ok, r.reason, r.why) for r in hooks.check()]


def _platform() -> str | None:
    """The kind of device that vLLM would run on."""
    try:
        from vllm.platforms import current_platform
    except ImportError:
        return None
    return str(current_platform.device_type)


def _runner() -> str:
    """The model runner under this plugin's methods, in words."""
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        return "V2, forced by VLLM_USE_V2_MODEL_RUNNER=1: unset it, the methods need V1"
    return "V1 (the methods choose it themselves)"


def _print(diagnosis: dict[str, Any]) -> None:
    facts = {key: str(diagnosis[key]) for key in ("python", "machine", "platform", "runner")}
    facts |= {name: found or "not installed" for name, found in diagnosis["versions"].items()}
    facts |= {group: ", ".join(e) or "none" for group, e in diagnosis["entry_points"].items()}
    if diagnosis["disabled"]:
        facts[VARIABLE] = (
            "set: vLLM runs as if this plugin were not installed, and refuses requests of ours"
        )
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        typer.echo(f"{name:{width}}{value}")
    typer.echo("")
    for c in diagnosis["checks"]:
        mark = (
            typer.style("PASS", fg=typer.colors.GREEN)
            if c["ok"]
            else typer.style("FAIL", fg=typer.colors.RED, bold=True)
        )
        needed = "" if c["ok"] or not c["why"] else f" (needed: {c['why']})"
        typer.echo(f"{mark}  {c['name']:{width}}{c['reason']}{needed}")
