# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.vllm_ext.engine import make_tiny_model
from vllm_ext.distill import run
from vllm_ext.distill.errors import DistillError
from vllm_ext.distill.run import Job, Plan, distill, layers_of
from vllm_ext.draft_vocab import FILE, LEAST, load
from vllm_ext.identity import tokenizer_hash

# The clock of these tests ticks a second per call.
PLAN = Plan(
    length=32,
    rows=4,
    answer=8,
    top_k=8,
    step_rows=2,
    others=32,
    rate=3e-3,
    evaluated=3,
    evaluated_answer=10,
    keep_every=5.0,
    teacher_share=0.45,
)


class Killed(BaseException):
    pass


def ticking(last: int | None = None) -> Callable[[], float]:
    """A clock that kills at its call number `last`."""
    calls = itertools.count()

    def clock() -> float:
        now = next(calls)
        if now == last:
            raise Killed
        return float(now)

    return clock


@pytest.fixture
def job(target_folder: Path, tmp_path: Path) -> Job:
    return Job(
        target=target_folder,
        out=tmp_path / "draft",
        inputs=(),
        held_out=None,
        layers=2,
        minutes=1.5,
        field="text",
        raw=False,
        seed=0,
    )


def made(job: Job, last: int | None = None) -> dict[str, Any]:
    return distill(job, lambda line: None, PLAN, ticking(last))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return found


def test_a_draft_is_made(job: Job) -> None:
    report = made(job)
    assert report == json.loads((job.out / "distill.json").read_text())
    assert {path.name for path in job.out.iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "generation_config.json", "chat_template.jinja", "distill.json", "draft_vocab.json",
    }  # fmt: skip
    assert not (job.out / ".distill").exists()
    assert tokenizer_hash(job.out) == tokenizer_hash(job.target)
    assert layers_of(job.out) == 2
    assert report["settings"]["taken_layers"] == [0, 2]
    assert report["after"]["t1"]["kl"]["mean"] < report["before"]["t1"]["kl"]["mean"]
    kept = load(job.out / FILE, report["draft_vocab"]["of"])
    assert report["draft_vocab"]["tokens"] == len(kept) == LEAST
    assert 0 < report["draft_vocab"]["covered"]["greedy"]["mean"] <= 1
    # 40.5 of 90 seconds are for writing, one batch at a time.
    assert abs(report["data"]["seconds"] - 40.5) < PLAN.length
    assert report["training"]["seconds"] >= report["training"]["budget_seconds"] > 0


@pytest.mark.parametrize("fast", ["float32", "bfloat16"])
def test_the_student_learns_as_the_target_computes(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: str
) -> None:
    """In bfloat16 where the CPU is fast in it; what is saved has the target's dtype either way."""
    AutoModelForCausalLM.from_pretrained(job.target).bfloat16().save_pretrained(tmp_path / "t")
    for path in job.target.iterdir():
        if not (tmp_path / "t" / path.name).exists():
            (tmp_path / "t" / path.name).write_bytes(path.read_bytes())
    narrow: list[bool] = []
    real = run.train

    def noted(student: Any, data: Any, checkpoint: Any, settings: Any, *more: Any) -> Any:
        narrow.append(settings.narrow)
        return real(student, data, checkpoint, settings, *more)

    monkeypatch.setattr(run, "train", noted)
    monkeypatch.setattr("vllm_ext.distill.student.fast_dtype", lambda: fast)
    report = made(dataclasses.replace(job, target=tmp_path / "t"))
    assert narrow == [fast == "bfloat16"]
    assert report["dtype"] == "bfloat16"


def test_an_early_exit_is_the_target_up_to_its_last_layer(job: Job) -> None:
    report = made(dataclasses.replace(job, early_exit=True))
    assert report["settings"]["taken_layers"] == [0, 2]
    target, draft = weights(job.target), weights(job.out)
    lower = [name for name in draft if "layers.0." in name]
    assert lower
    assert all(torch.equal(draft[name], target[name]) for name in lower)
    adapter = [name for name in draft if "layers.1." in name]
    assert not any(
        torch.equal(draft[name], target[name.replace("layers.1.", "layers.2.")]) for name in adapter
    )
    with pytest.raises(DistillError, match="early_exit: True there, False now"):
        made(job)


def test_killed_anywhere_the_same_command_goes_on(job: Job, tmp_path: Path) -> None:
    """The draft is bit for bit that of an uninterrupted run."""
    whole = made(job)
    wanted = weights(job.out)
    # In the second batch, and before and after the first checkpoint.
    for last in (25, 46, 60):
        cut = dataclasses.replace(job, out=tmp_path / f"cut-{last}")
        with pytest.raises(Killed):
            made(cut, last)
        assert not (cut.out / "distill.json").exists()
        report = made(cut)
        assert report["training"] == whole["training"]
        assert report["after"] == whole["after"]
        for name, tensor in weights(cut.out).items():
            assert torch.equal(tensor, wanted[name]), (last, name)


def test_a_finished_draft_is_not_made_again(job: Job) -> None:
    report = made(job)
    kept = (job.out / "model.safetensors").stat().st_mtime_ns
    # A clock that kills at once: nothing asks for the time.
    assert made(job, last=0) == report
    assert (job.out / "model.safetensors").stat().st_mtime_ns == kept


def test_another_draft_in_the_folder_is_refused(job: Job, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        made(job, last=5)
    with pytest.raises(DistillError, match=r"made otherwise \(layers: 2 there, 1 now\)"):
        made(dataclasses.replace(job, layers=1))
    made(job)
    with pytest.raises(DistillError, match=r"minutes: 1\.5 there, 3\.0 now"):
        made(dataclasses.replace(job, minutes=3.0))
    other = make_tiny_model(tmp_path / "other", 512)
    with pytest.raises(DistillError, match="target: "):
        made(dataclasses.replace(job, target=other))


def test_a_folder_of_other_files_is_refused(job: Job) -> None:
    job.out.mkdir()
    (job.out / "notes.txt").write_text("mine")
    with pytest.raises(DistillError, match="holds other files"):
        made(job)
    assert [path.name for path in job.out.iterdir()] == ["notes.txt"]
    with pytest.raises(DistillError, match="is a file"):
        made(dataclasses.replace(job, out=job.out / "notes.txt"))
    with pytest.raises(DistillError, match="holds other files"):
        made(dataclasses.replace(job, out=job.target))


def test_a_broken_journal_is_one_error(job: Job) -> None:
    with pytest.raises(Killed):
        made(job, last=5)
    (job.out / ".distill" / "journal.json").write_text("{")
    with pytest.raises(DistillError, match=r"journal\.json cannot be read"):
        made(job)


def test_too_many_layers_leave_nothing_behind(job: Job) -> None:
    with pytest.raises(DistillError, match="give 1 to 2"):
        made(dataclasses.replace(job, layers=3))
    assert not job.out.exists()


def test_layers_of_what_is_no_decoder(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="is no model"):
        layers_of(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "t5", "is_encoder_decoder": True})
    )
    with pytest.raises(DistillError, match="only decoders of text"):
        layers_of(tmp_path)


_DIES = """
import os, signal, sys
from pathlib import Path
from tests.vllm_ext.distill import test_run

def clock(ticks=test_run.ticking(last=75)):
    try:
        return ticks()
    except test_run.Killed:
        os.kill(os.getpid(), signal.SIGKILL)

job = test_run.Job(Path(sys.argv[1]), Path(sys.argv[2]), (), None, 2, 1.5, "text", False, 0)
test_run.distill(job, print, test_run.PLAN, clock)
"""


@pytest.mark.slow
def test_a_process_that_is_really_killed(job: Job, tmp_path: Path) -> None:
    cut = dataclasses.replace(job, out=tmp_path / "cut")
    died = subprocess.run(
        [sys.executable, "-c", _DIES, str(cut.target), str(cut.out)],
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert died.returncode == -signal.SIGKILL
    assert (cut.out / ".distill" / "checkpoint.pt").exists()
    made(cut)
    made(job)
    wanted = weights(job.out)
    for name, tensor in weights(cut.out).items():
        assert torch.equal(tensor, wanted[name]), name
