# SPDX-License-Identifier: Apache-2.0
"""From a model to its draft head: the target writes and reads, the head is fitted."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from proposers.hydra import HydraHead
from vllm_ext.cli import engines
from vllm_ext.cli.environment import describe, has_cuda
from vllm_ext.cli.progress import progress, whole_seconds
from vllm_ext.distill.errors import DistillError
from vllm_ext.distill.student import check_target
from vllm_ext.distill.texts import Encoder, collect
from vllm_ext.heads.features import Features, read
from vllm_ext.heads.training import HeadSettings, fit, frequent, judged
from vllm_ext.heads.writing import Sample, template_of, write
from vllm_ext.prime import default_anchor

_TOP_K = 32
_LONGEST_PROMPT = 256
_MOST_ROWS = 128


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """How the time is shared out.

    Attributes:
        writing: share of the time for the target's writing.
        training: least share for the training: on a slow machine not all of the text is read.
        answer: most tokens of an answer.
        held_out: one text of so many is kept out of the training, for the evaluation.
        context: most tokens of a text.
    """

    writing: float = 0.4
    training: float = 0.3
    answer: int = 220
    held_out: int = 16
    context: int = 1024

    def reading(self, total: float, spent: float) -> float:
        """Seconds for reading; where the writing took too long, some text is read all the same."""
        return max(total * (1 - self.training) - spent, total * self.training / 2)

    def fitting(self, total: float, spent: float) -> float:
        """Seconds for the training: what is left, and its share in any case."""
        return max(total - spent, total * self.training)


def make_head(
    target: Path,
    out: Path,
    identity: dict[str, str],
    inputs: Sequence[Path],
    minutes: float,
    settings: HeadSettings,
    dtype: str,
    say: Callable[[str], None],
    plan: HeadPlan | None = None,
) -> dict[str, Any]:
    """Make the head of the model in `target` and write it to `out`, its report beside it.

    Args:
        target: folder of the model.
        out: file of the head; the report goes to the same name with `.json` behind it.
        identity: of the target.
        inputs: prompts and texts of the user's own, as for `vllm-ext distill`; may be empty.
        minutes: for everything, about.
        settings: of the head.
        dtype: in which the target writes and reads.
        say: gets a line now and then.
        plan: of the time, if not the usual one.

    Returns:
        The report.

    Raises:
        DistillError: if the target or the texts cannot be used, or it wrote too little.
    """
    plan = plan or HeadPlan()
    begin = time.monotonic()
    environment = describe()
    total = 60 * minutes
    samples = _written(target, inputs, dtype, total * plan.writing, plan)
    written = time.monotonic() - begin
    model = _loaded(target, dtype)
    features, held_out = _read(model, samples, plan, plan.reading(total, time.monotonic() - begin))
    weight = model.get_output_embeddings().weight.detach()
    tokens = frequent(features, len(weight), settings.tokens)
    embeddings = model.get_input_embeddings().weight.detach()[: model.config.vocab_size]
    outputs = weight[tokens.to(weight.device)]
    del model
    spent = time.monotonic() - begin
    budget = plan.fitting(total, spent)
    say(f"training: {len(features)} places of {features.texts} texts, {budget:.0f} s")
    with progress("training", total=round(budget)) as advance:
        head = fit(features, tokens, embeddings, outputs, settings, budget, whole_seconds(advance))
    # What is judged is what is stored, rounded.
    head = HydraHead(**{name: _rounded(tensor) for name, tensor in head.tensors().items()})
    report = {
        "settings": asdict(settings),
        "plan": asdict(plan),
        "minutes": minutes,
        "dtype": dtype,
        "data": {
            "texts": len(samples),
            "read": features.texts + held_out.texts,
            "places": len(features),
            "held_out": len(held_out),
        },
        "seconds": {"writing": written, "reading": spent - written, "training": budget},
        "agreement": {
            kind: [asdict(one) for one in depths]
            for kind, depths in judged(head, held_out, settings.depth).items()
        },
        "parameters": sum(tensor.numel() for tensor in head.tensors().values()),
        "environment": environment,
    }
    head.save(out, identity)
    Path(f"{out}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def _written(
    target: Path, inputs: Sequence[Path], dtype: str, budget: float, plan: HeadPlan
) -> list[Sample]:
    # Nothing else runs meanwhile: no core is kept free for a server.
    # 128 rows of a small model need more KV than engines of other commands.
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    for name, value in ({} if has_cuda() else environment).items():
        os.environ.setdefault(name, value)
    from vllm import LLM

    options = engines.llm_options(
        model=str(target), dtype=dtype, max_model_len=plan.context, eager=None, cuda=has_cuda()
    )
    llm = LLM(**options, max_num_seqs=_MOST_ROWS)
    try:
        tokenizer = llm.get_tokenizer()
        texts = collect(
            Encoder(tokenizer, raw=False),
            inputs,
            None,
            field="text",
            longest=min(_LONGEST_PROMPT, plan.context - plan.answer),
            evaluated=0,
            seed=0,
        )
        template = template_of(tokenizer, default_anchor(tokenizer))
        with progress("writing", total=round(budget)) as advance:
            return write(
                llm,
                template,
                texts.prompts if inputs else [],
                plan.answer,
                plan.context,
                budget,
                whole_seconds(advance),
            )
    finally:
        llm.llm_engine.engine_core.shutdown()


def _loaded(target: Path, dtype: str) -> Any:
    """The target, to read with."""
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DistillError(f"target {target} cannot be loaded: {error}") from error
    model = model.to(device).eval().requires_grad_(False)
    check_target(model)
    return model


def _read(
    model: Any, samples: Sequence[Sample], plan: HeadPlan, budget: float
) -> tuple[Features, Features]:
    """Features to train on, and to evaluate on, as far as `budget` seconds go.

    Raises:
        DistillError: if either would be empty.
    """
    useful = [sample for sample in samples if len(sample.answer) > 1]
    held_out = useful[:: plan.held_out]
    kept = [sample for i, sample in enumerate(useful) if i % plan.held_out]
    if not kept:
        raise DistillError(
            f"the target wrote {len(samples)} texts, of which {len(useful)} have two tokens: at "
            "least two such texts are needed; give more prompts, or more minutes"
        )
    with progress("reading", total=len(useful)) as advance:

        def read_on(count: int) -> None:
            advance(count, "")

        share = len(held_out) / len(useful)
        judged_on = read(model, held_out, _TOP_K, read_on, budget * share)
        return read(model, kept, _TOP_K, read_on, budget * (1 - share)), judged_on


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
