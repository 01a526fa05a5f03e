# SPDX-License-Identifier: Apache-2.0
"""The entry point: idempotent, inert on request, harmless where vLLM is missing or has moved on."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from tests.vllm_ext.logs import logged
from vllm_ext import background, enclosed, hooks, plugin
from vllm_ext.config import CONFIG_KEY, PLACEHOLDER_CLASS
from vllm_ext.methods import OptionError


def test_the_entry_point_is_installed() -> None:
    found = [e for e in entry_points(group="vllm.general_plugins") if e.name == "vllm_ext"]
    assert [e.value for e in found] == ["vllm_ext.plugin:register"]


def test_registering_twice_wraps_once() -> None:
    plugin.register()
    first = EngineArgs.create_speculative_config
    plugin.register()
    assert EngineArgs.create_speculative_config is first
    assert getattr(first, "__wrapped__", None) is not None


def test_the_command_line_knows_our_methods() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    plugin.register()
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    given = parser.parse_args(["--spec-method", "dyspec", "--spec-tokens", "5"])
    assert (given.spec_method, given.spec_tokens) == ("dyspec", 5)
    with pytest.raises(SystemExit):
        parser.parse_args(["--spec-method", "no_such_method"])


def speculate(config: dict[str, Any]) -> Any:
    """What vLLM makes of a speculative config, with our hook around it."""
    plugin.register()
    args = EngineArgs(model="m", speculative_config=config)
    return args.create_speculative_config(None, None)


@pytest.mark.parametrize("method", ["dyspek", "DySpec", ["dyspec"], {"dyspec": 1}, 7])
def test_a_method_that_nobody_has_is_told_who_has_what(method: Any) -> None:
    with pytest.raises(OptionError, match=r"of vllm-ext: dyspec, .*of vLLM: ngram, .*eagle"):
        speculate({"method": method, "num_speculative_tokens": 3})
    if method != 7:
        with pytest.raises(OptionError, match="Did you mean 'dyspec'"):
            speculate({"method": method, "max_depth": 3})


def test_methods_of_vllm_are_left_to_vllm() -> None:
    assert speculate({"method": "custom_class", "model": "a.B", "num_speculative_tokens": 3})
    with pytest.raises(ValidationError) as error:
        speculate({"method": "ngram", "num_speculative_tokens": -3})
    assert "vllm-ext" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "plugins", "server", "advice"),
    [
        ("background", None, True, "set VLLM_PLUGINS=vllm_ext"),
        ("background", "another", True, "set VLLM_PLUGINS=vllm_ext"),
        ("background", "vllm_ext", False, "only a server.*vllm-ext prime --model"),
        ("background", "another,vllm_ext", True, None),
        ("auto", None, True, None),
        ("off", None, False, None),
    ],
)
def test_priming_that_cannot_happen_is_told_once(
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    plugins: str | None,
    server: bool,
    advice: str | None,
) -> None:
    if plugins is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    background.warn_if_impossible.cache_clear()
    with logged(logging.WARNING) as lines:
        for _ in range(3):
            background.warn_if_impossible(option, server=server)
    assert len(lines) == (advice is not None)
    assert re.search(advice or "^$", "".join(lines))


@pytest.mark.parametrize("server", [False, True])
def test_the_hook_knows_a_server(monkeypatch: pytest.MonkeyPatch, server: bool) -> None:
    plugin.register()
    asked: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        background, "warn_if_impossible", lambda option, server: asked.append((option, server))
    )
    monkeypatch.setattr("vllm_ext.worker.metrics.share_with_workers", lambda: None)
    monkeypatch.setattr("vllm_ext.config.translate", lambda *_: None)
    args = (AsyncEngineArgs if server else EngineArgs)(model="m")
    args.speculative_config = {
        "method": "custom_class",
        "model": PLACEHOLDER_CLASS,
        "num_speculative_tokens": 3,
    }
    args.additional_config = {CONFIG_KEY: {"method": "dyspec", "options": {"prime": "background"}}}
    args.create_speculative_config(None, None)
    assert asked == [("background", server)]


def test_min_p_is_refused_for_others_and_allowed_for_us() -> None:
    plugin.register()
    params = SamplingParams(min_p=0.1)
    with pytest.raises(VLLMValidationError):
        params._validate_spec_decode(SimpleNamespace(model="another"))
    params._validate_spec_decode(SimpleNamespace(model=PLACEHOLDER_CLASS))


def test_bad_limits_are_refused_before_the_engine_starts(served_model: Path) -> None:
    """The configuration comes first: no process has been started when it is refused."""
    plugin.register()

    def configured(options: dict[str, Any]) -> Any:
        given = {"vllm_ext_constraints": options}
        args = EngineArgs(model=str(served_model), max_model_len=64, additional_config=given)
        return args.create_engine_config().additional_config["vllm_ext_constraints"]

    with pytest.raises(ValueError, match=r"unknown option 'max_byte'.*known: max_bytes, "):
        configured({"max_byte": 5})
    with pytest.raises(ValueError, match=r"\['max_bytes'\] given as -5"):
        configured({"max_bytes": -5})
    assert configured({"max_bytes": 5}) == {"max_bytes": 5}


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
        timeout=120,
    )


def test_disabled_means_nothing_is_touched() -> None:
    code = (
        "from vllm_ext.plugin import register; register(); "
        "import sys; print('vllm.engine.arg_utils' in sys.modules)"
    )
    done = run(code, VLLM_EXT_DISABLE="1")
    assert done.stdout.strip() == "False", done.stderr


BLOCK_VLLM = "import sys; sys.modules['vllm'] = None; "


def test_the_package_imports_without_vllm() -> None:
    done = run(BLOCK_VLLM + "import vllm_ext, proposers, logits_processors, vllm_ext.methods")
    assert done.returncode == 0, done.stderr


def test_the_plugin_without_vllm_says_what_to_install() -> None:
    done = run(BLOCK_VLLM + "import vllm_ext.plugin as p; p.register()")
    assert done.returncode != 0
    assert "pip install 'vllm-ext[cpu]'" in done.stderr


def test_proposers_and_cores_import_no_vllm() -> None:
    code = (
        "import sys, pkgutil, importlib, proposers, logits_processors\n"
        "for p in (proposers, logits_processors):\n"
        "    for m in pkgutil.walk_packages(p.__path__, p.__name__ + '.'):\n"
        "        if '.vllm_' not in m.name: importlib.import_module(m.name)\n"
        "assert not any(m == 'vllm' or m.startswith('vllm.') for m in sys.modules)"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_a_moved_front_end_leaves_others_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gone = hooks.Hook("gone", "vllm.engine.arg_utils:Nothing", None, "x", "y")
    monkeypatch.setattr(hooks, "FRONTEND", (gone,))
    logger = logging.getLogger("vllm.vllm_ext")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.ERROR, logger=logger.name):
        plugin.register()
    assert "vllm.engine.arg_utils:Nothing" in caplog.text


def test_an_untested_vllm_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.32.7")
    with logged(logging.WARNING) as lines:
        plugin.warn_if_untested.cache_clear()
        plugin.warn_if_untested()
        assert not lines
        monkeypatch.setattr(vllm, "__version__", "9.9.1")
        plugin.warn_if_untested.cache_clear()
        for _ in range(3):
            plugin.warn_if_untested()
    assert len(lines) == 1
    assert "9.9.1" in lines[0]
    plugin.warn_if_untested.cache_clear()


def test_constraints_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.worker_base import WorkerBase

    from logits_processors.vllm_entry import LogitsProcessor
    from vllm_ext.constraints.records import RPC

    monkeypatch.setattr(LogitsProcessor, "admission", False)
    plugin.register()
    assert LogitsProcessor.admission is True
    assert callable(getattr(WorkerBase, RPC))
    assert all(report.ok for report in hooks.check(hooks.CONSTRAINTS))
    assert set(hooks.CONSTRAINTS) <= set(hooks.ALL)


def test_constraints_are_off_where_vllm_has_moved_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from logits_processors.vllm_entry import LogitsProcessor

    gone = hooks.Hook("gone", "vllm.v1.worker.worker_base:Nothing", None, "x", "y")
    monkeypatch.setattr(hooks, "CONSTRAINTS", (gone,))
    monkeypatch.setattr(LogitsProcessor, "admission", False)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.ERROR, logger="vllm.vllm_ext"):
        plugin.register()
    assert "constraints are off" in caplog.text
    with pytest.raises(VLLMValidationError, match="plugin is not active"):
        LogitsProcessor.validate_params(SamplingParams(extra_args={"constraint_regex": "a"}))


def test_drafts_that_need_a_message_are_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(enclosed, "install", lambda: pytest.fail("installed all the same"))
    gone = hooks.Hook("gone", "vllm.v1.executor.multiproc_executor:Nothing", None, "x", "y")
    monkeypatch.setattr(hooks, "EXECUTOR", (gone,))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="vllm.vllm_ext"):
        plugin.register()
    assert "multiproc_executor:Nothing" in caplog.text


def test_the_entry_points_of_constraints_resolve() -> None:
    for group in ("vllm.logits_processors", "vllm.endpoint_plugins"):
        for entry in entry_points(group=group).select(name="vllm_ext"):
            assert isinstance(entry.load(), type)
