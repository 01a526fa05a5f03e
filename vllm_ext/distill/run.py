# SPDX-License-Identifier: Apache-2.0
"""Everything in order: what is held out, the target's writing, the training, the evaluation.

Each part is done once and kept (see `workspace`), so the same command goes on where it was killed.
The time is shared out so that the whole ends near the given minutes: a fixed share for the target's
writing, what evaluation takes as measured, and the rest for training.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_ext import draft_vocab
from vllm_ext.cli.environment import describe
from vllm_ext.cli.progress import progress, whole_seconds
from vllm_ext.distill import data, evaluate, vocab
from vllm_ext.distill.errors import DistillError
from vllm_ext.distill.student import (
    early_exit,
    load_target,
    make_student,
    save_student,
    spread,
    stored_dtype,
)
from vllm_ext.distill.texts import Encoder, Texts, collect
from vllm_ext.distill.train import Progress, TrainSettings, train
from vllm_ext.distill.workspace import Workspace, files_hash
from vllm_ext.identity import IdentityError, model_hash, tokenizer_hash

_WIDTH = 576


@dataclass(frozen=True)
class Plan:
    """What does not depend on the user's choice; tests make it small.

    Attributes:
        length: tokens of a training sequence.
        rows: sequences that the target writes at once.
        answer: most tokens of an answer within a sequence.
        top_k: next tokens kept per position.
        step_rows: sequences of a training step.
        others: sampled tokens of the normaliser.
        rate: highest learning rate up to a hidden size of 576; of wider models, less in proportion,
            as their gradients add up over more inputs.
        teacher_share: of the time, for the target's writing.
        evaluated: most prompts of the evaluation.
        evaluated_answer: most tokens of an answer there.
        keep_every: seconds between checkpoints.
    """

    length: int = 384
    rows: int = 64
    answer: int = 160
    top_k: int = 32
    step_rows: int = 2
    others: int = 1024
    rate: float = 2e-3
    teacher_share: float = 0.6
    evaluated: int = 32
    evaluated_answer: int = 64
    keep_every: float = 60.0


@dataclass(frozen=True)
class Job:
    """What the user asks for.

    Attributes:
        target: folder of the model.
        out: folder of the draft.
        inputs: texts and prompts.
        held_out: prompts of the evaluation; if `None`, some of the prompts are put aside.
        layers: of the draft.
        early_exit: whether all but the last of them stay the target's lowest ones.
        minutes: for everything.
        field: key of the text in JSON lines.
        raw: no chat template.
        seed: of everything random.
    """

    target: Path
    out: Path
    inputs: tuple[Path, ...]
    held_out: Path | None
    layers: int
    minutes: float
    field: str
    raw: bool
    seed: int
    early_exit: bool = False


def distill(
    job: Job,
    say: Callable[[str], None],
    plan: Plan | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Make the draft, or go on making it.

    Args:
        job: what is asked for.
        say: gets a line now and then.
        plan: of the work, if not the usual one.
        clock: seconds, from any beginning.

    Returns:
        The report, which is also in the folder as `distill.json`.

    Raises:
        DistillError: if something given cannot be used.
    """
    plan = plan or Plan()
    picked = (early_exit if job.early_exit else spread)(job.layers, layers_of(job.target))
    texts, ends = _texts(job, plan)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    space = Workspace(job.out, _identity(job, plan, device))
    finished = space.report()
    if finished is not None:
        return finished
    target = load_target(job.target, device)
    return _Distilling(job, plan, target, picked, texts, ends, space, say, clock).run()


def layers_of(target: Path) -> int:
    """How many layers a target has, from its configuration alone.

    Raises:
        DistillError: if the folder is no model, or its configuration does not say.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(target)
    except (OSError, ValueError, KeyError) as error:
        raise DistillError(f"target {target} is no model: {error}") from error
    total = getattr(config, "num_hidden_layers", None)
    if config.is_encoder_decoder or not isinstance(total, int):
        raise DistillError(
            f"target {target} ({config.model_type}) cannot be cut: only decoders of text can"
        )
    return total


class _Distilling:
    def __init__(
        self,
        job: Job,
        plan: Plan,
        target: Any,
        picked: list[int],
        texts: Texts,
        ends: list[int],
        space: Workspace,
        say: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self._job = job
        self._plan = plan
        self._space = space
        self._say = say
        self._clock = clock
        self._begin = clock()
        self._target = target
        self._picked = picked
        self._texts = texts
        self._ends = ends

    def run(self) -> dict[str, Any]:
        # What it began with: the code may have changed by the end.
        environment = self._space.once("environment", describe)
        total = 60 * self._job.minutes
        frozen = self._job.layers - 1 if self._job.early_exit else 0
        student = make_student(self._target, self._picked, frozen)
        texts = self._space.once("answers", self._answers)
        answered = self._clock()
        before = self._space.once("before", lambda: self._judged(student, texts))
        # Judging comes again at the end.
        aside = self._space.once(
            "aside_seconds", lambda: 2 * self._clock() - answered - self._begin
        )
        spent = self._data(total * self._plan.teacher_share)
        budget = self._space.once("training_seconds", lambda: max(total - spent - aside, total / 4))
        trained = self._train(student, budget)
        dtype = stored_dtype(self._job.target)
        save_student(student, self._job.target, self._job.out, dtype)
        kept = vocab.frequent(
            data.load(self._space.hidden / "data"), student.config.vocab_size, self._ends
        )
        draft_vocab.save(self._job.out / draft_vocab.FILE, kept)
        # What is judged is what was written, rounded to the stored dtype.
        student = load_target(self._job.out, self._target.device)
        report = {
            "settings": {**_plain(asdict(self._job)), "taken_layers": self._picked},
            "plan": asdict(self._plan),
            "data": {
                "prompts": len(self._texts.prompts),
                "passages": len(self._texts.passages),
                "left_out_as_held_out": self._texts.left_out,
                "tokens": data.load(self._space.hidden / "data").tokens.numel(),
                "seconds": spent,
            },
            "training": {**asdict(trained), "budget_seconds": budget},
            "before": before,
            "after": self._judged(student, texts),
            "draft_vocab": {
                "tokens": len(kept),
                "of": student.config.vocab_size,
                "covered": {
                    name: evaluate.covered([evaluate.Text(**t) for t in texts[name]], kept)
                    for name in ("greedy", "t1")
                },
            },
            "parameters": {"target": _size(self._target), "draft": _size(student)},
            "milliseconds_per_token": {
                "target": evaluate.milliseconds(self._target),
                "draft": evaluate.milliseconds(student),
                "draft_of_its_vocabulary": evaluate.milliseconds(student, kept),
            },
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "device": str(self._target.device),
            "environment": environment,
        }
        return self._space.finish(report)

    def _answers(self) -> dict[str, Any]:
        prompts = self._texts.held_out
        self._say(f"evaluation: the target answers {len(prompts)} held-out prompts, twice")
        with progress("answering", total=len(prompts)) as advance:
            greedy, sampled = evaluate.answers(
                self._target,
                prompts,
                self._ends,
                self._plan.evaluated_answer,
                self._job.seed,
                lambda count: advance(count, ""),
            )
        return {
            "greedy": [asdict(text) for text in greedy],
            "t1": [asdict(text) for text in sampled],
        }

    def _judged(self, student: Any, texts: dict[str, Any]) -> dict[str, Any]:
        found = {
            name: evaluate.compare(self._target, student, [evaluate.Text(**t) for t in texts[name]])
            for name in ("greedy", "t1")
        }
        return evaluate.summary(found["greedy"], found["t1"])

    def _data(self, budget: float) -> float:
        self._say(f"data: the target writes for {budget:.0f} s")
        with progress("writing", total=round(budget)) as advance:
            return data.make(
                self._target,
                self._texts,
                self._ends,
                self._space.hidden / "data",
                data.DataSettings(
                    self._plan.length,
                    self._plan.rows,
                    self._plan.answer,
                    self._plan.top_k,
                    self._job.seed,
                ),
                budget,
                self._clock,
                whole_seconds(advance),
            )

    def _train(self, student: Any, budget: float) -> Progress:
        found = data.load(self._space.hidden / "data")
        self._say(f"training: {found.tokens.numel()} tokens, {budget:.0f} s")
        with progress("training", total=round(budget)) as advance:
            whole = whole_seconds(advance)
            return train(
                student,
                found,
                self._space.hidden / "checkpoint.pt",
                TrainSettings(
                    self._plan.rate * min(1.0, _WIDTH / self._target.config.hidden_size),
                    self._plan.step_rows,
                    self._plan.others,
                    self._job.seed,
                    keep_every=self._plan.keep_every,
                    # As fast as the target itself computes (see `load_target`).
                    narrow=self._target.device.type != "cpu"
                    or self._target.dtype == torch.bfloat16,
                ),
                budget,
                self._clock,
                lambda seconds, state: whole(seconds, _stand(state)),
                lambda state: self._say(f"training: {state.seconds:.0f} s, {_stand(state)}"),
            )


def _texts(job: Job, plan: Plan) -> tuple[Texts, list[int]]:
    """What there is to read and ask, and the tokens that end an answer."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(job.target)
    texts = collect(
        Encoder(tokenizer, raw=job.raw),
        job.inputs,
        job.held_out,
        field=job.field,
        longest=plan.length // 2,
        evaluated=plan.evaluated,
        seed=job.seed,
    )
    try:
        said = GenerationConfig.from_pretrained(job.target).eos_token_id
    except OSError:
        said = None
    listed = said if isinstance(said, list) else [said]
    ends = [end for end in (tokenizer.eos_token_id, *listed) if end is not None]
    if not ends:
        raise DistillError(f"target {job.target} names no token that ends a text (eos_token)")
    return texts, list(dict.fromkeys(ends))


def _identity(job: Job, plan: Plan, device: torch.device) -> dict[str, Any]:
    held_out = () if job.held_out is None else (job.held_out,)
    try:
        return {
            "target": model_hash(job.target),
            "tokenizer": tokenizer_hash(job.target),
            "inputs": files_hash(job.inputs),
            "held_out": files_hash(held_out),
            "layers": job.layers,
            "early_exit": job.early_exit,
            "minutes": job.minutes,
            "field": job.field,
            "raw": job.raw,
            "seed": job.seed,
            "device": device.type,
            "plan": asdict(plan),
        }
    except IdentityError as error:
        raise DistillError(str(error)) from error


def _stand(state: Progress) -> str:
    return f"step {state.step}, epoch {state.epochs:.2f}, KL {state.loss:.3f}"


def _size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [str(path) for path in value]
        if isinstance(value, tuple)
        else str(value)
        if isinstance(value, Path)
        else value
        for name, value in settings.items()
    }
