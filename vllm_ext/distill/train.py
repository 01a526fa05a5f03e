# SPDX-License-Identifier: Apache-2.0
"""The training loop: AdamW on the forward KL of `loss`, for a given time.

The learning rate follows the time that is spent, not a number of steps, so a run ends with a
learning rate of zero on a fast machine and on a slow one. Everything random is a function of the
seed and the step; with the checkpoint's seconds a resumed run takes the steps that an uninterrupted
one would have taken.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_ext.distill.loss import candidates, forward_kl
from vllm_ext.distill.student import head_logits
from vllm_ext.distill.teacher import Labelled


@dataclass(frozen=True)
class TrainSettings:
    """How the student learns.

    Attributes:
        rate: highest learning rate.
        rows: sequences of a step.
        others: sampled tokens of the normaliser (see `loss`).
        seed: of the order and the sample.
        warmup: share of the time in which the learning rate rises.
        clip: largest norm of a gradient.
        keep_every: seconds between checkpoints.
        narrow: whether products are computed in bfloat16; weights and gradients stay float32.
    """

    rate: float
    rows: int
    others: int
    seed: int
    warmup: float = 0.03
    clip: float = 1.0
    keep_every: float = 60.0
    narrow: bool = False


@dataclass(frozen=True)
class Progress:
    """Where the training stands.

    Attributes:
        step: steps taken.
        seconds: time spent on them.
        loss: exponential mean of the loss, in nats.
        epochs: how often each sequence was seen, on average.
    """

    step: int
    seconds: float
    loss: float
    epochs: float


def learning_rate(peak: float, progress: float, warmup: float) -> float:
    """Linear from 0 to `peak` over `warmup`, then half a cosine down to 0 at `progress` 1."""
    if progress < warmup:
        return peak * progress / warmup
    left = min(1.0, (progress - warmup) / (1 - warmup))
    return peak * 0.5 * (1 + math.cos(math.pi * left))


def train(
    student: Any,
    data: Labelled,
    checkpoint: Path,
    settings: TrainSettings,
    budget: float,
    clock: Callable[[], float],
    advance: Callable[[float, Progress], None],
    kept: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Train `student` in place for `budget` seconds, going on from `checkpoint` if it exists.

    Args:
        student: float32; the parameters that take gradients are trained.
        data: the labelled sequences.
        checkpoint: file that is replaced every `settings.keep_every` seconds and at the end.
        settings: of the training.
        budget: seconds, those before the checkpoint included; at least one step is taken.
        clock: seconds, from any beginning.
        advance: called after each step with its seconds.
        kept: called after each checkpoint.
    """
    named = {name: p for name, p in student.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        named.values(), lr=settings.rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    state = Progress(0, 0.0, math.nan, 0.0)
    if checkpoint.exists():
        state = _restore(checkpoint, named, optimizer)
        advance(state.seconds, state)
    student.train()
    last_kept = state.seconds
    while state.step == 0 or state.seconds < budget:
        begin = clock()
        rate = learning_rate(settings.rate, state.seconds / budget, settings.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _step(student, data, settings, state.step)
        torch.nn.utils.clip_grad_norm_(named.values(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        seconds = clock() - begin
        mean = loss if state.step == 0 else 0.98 * state.loss + 0.02 * loss
        step = state.step + 1
        state = Progress(
            step, state.seconds + seconds, mean, step * settings.rows / len(data.tokens)
        )
        advance(seconds, state)
        if state.seconds - last_kept >= settings.keep_every or state.seconds >= budget:
            _keep(checkpoint, named, optimizer, state)
            last_kept = state.seconds
            kept(state)
    student.eval()
    return state


def _step(student: Any, data: Labelled, settings: TrainSettings, step: int) -> float:
    """Gradients of one batch; returns its loss."""
    device = student.device
    rows = _rows(len(data.tokens), settings, step)
    tokens = data.tokens[rows].to(device, torch.int64)
    ids = data.ids[rows].to(device, torch.int64).flatten(0, 1)
    probs = data.probs[rows].to(device, torch.float32).flatten(0, 1)
    generator = torch.Generator().manual_seed(settings.seed + step)
    chosen = candidates(ids, student.config.vocab_size, settings.others, generator)
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.narrow):
        hidden = student.model(tokens, use_cache=False).last_hidden_state.flatten(0, 1)
        logits = head_logits(student, hidden, chosen.tokens)
    loss = forward_kl(logits, probs, chosen)
    torch.autograd.backward(loss)
    return loss.item()


def _rows(total: int, settings: TrainSettings, step: int) -> torch.Tensor:
    """Which sequences a step sees: each once per epoch, in an order of that epoch's own."""
    first = step * settings.rows
    wanted = torch.arange(first, first + settings.rows)
    orders = {
        int(epoch): torch.randperm(
            total, generator=torch.Generator().manual_seed(settings.seed + int(epoch))
        )
        for epoch in torch.unique(wanted // total)
    }
    return torch.stack([orders[int(i) // total][int(i) % total] for i in wanted])


def _keep(path: Path, named: dict[str, Any], optimizer: Any, state: Progress) -> None:
    part = path.with_suffix(".part")
    torch.save(
        {
            "parameters": {name: parameter.detach() for name, parameter in named.items()},
            "optimizer": optimizer.state_dict(),
            "progress": vars(state),
        },
        part,
    )
    os.replace(part, path)


def _restore(path: Path, named: dict[str, Any], optimizer: Any) -> Progress:
    found = torch.load(path, weights_only=True, map_location="cpu")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(found["parameters"][name])
    optimizer.load_state_dict(found["optimizer"])
    return Progress(**found["progress"])
