# SPDX-License-Identifier: Apache-2.0
"""The target reads what was written; its hidden states and what it says next are kept."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_ext.distill.teacher import labels
from vllm_ext.heads.writing import Sample

_TOGETHER = 8


@dataclass(frozen=True, slots=True)
class Features:
    """P places of answers, one text after another; place i was read before its token is drawn.

    Attributes:
        hidden: the target's last hidden state there, bfloat16 [P, D].
        token: drawn from it, int64 [P].
        ids: the likeliest of the tokens that could be drawn, int64 [P, K].
        probs: their probabilities at temperature 1, float16 [P, K].
        left: places of the text from here to its end, itself included, int64 [P].
        greedy: whether the text was written greedily, bool [P].
    """

    hidden: Tensor
    token: Tensor
    ids: Tensor
    probs: Tensor
    left: Tensor
    greedy: Tensor

    def __len__(self) -> int:
        return len(self.token)

    @property
    def texts(self) -> int:
        """How many texts the places are of."""
        return int((self.left == 1).sum())


@torch.inference_mode()
def read(
    target: Any,
    samples: Sequence[Sample],
    top_k: int,
    advance: Callable[[int], None],
    budget: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
) -> Features:
    """Features of the answers of `samples`, in their order.

    Args:
        target: the model (transformers).
        samples: texts; those without an answer are left out.
        top_k: K.
        advance: called with the number of new texts.
        budget: seconds; then the rest is left out, texts of any length. Some are read in any case.
        clock: seconds, from any beginning.
    """
    started = clock()
    wanted = [i for i, sample in enumerate(samples) if sample.answer]
    parts: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    # Texts of similar length together: what is padded is computed for nothing.
    order = sorted(wanted, key=lambda i: len(samples[i].prompt) + len(samples[i].answer))
    batches = [order[first : first + _TOGETHER] for first in range(0, len(order), _TOGETHER)]
    random.Random(0).shuffle(batches)
    for some in batches:
        if parts and clock() - started >= budget:
            break
        rows = [samples[i].prompt + samples[i].answer for i in some]
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)
        # Padding stands behind the text, where a causal model does not look.
        hidden = target.model(tokens.to(target.device), use_cache=False).last_hidden_state
        for i, states in zip(some, hidden, strict=True):
            begin = len(samples[i].prompt) - 1
            answer = states[begin : begin + len(samples[i].answer)]
            parts[i] = (answer.to("cpu", torch.bfloat16), *labels(target, answer, top_k))
        advance(len(some))
    wanted = [i for i in wanted if i in parts]
    answers = [samples[i].answer for i in wanted]
    return Features(
        hidden=torch.cat([parts[i][0] for i in wanted]),
        token=torch.tensor([token for answer in answers for token in answer]),
        ids=torch.cat([parts[i][1] for i in wanted]).long(),
        probs=torch.cat([parts[i][2] for i in wanted]),
        left=torch.cat([torch.arange(len(answer), 0, -1) for answer in answers]),
        greedy=torch.cat(
            [torch.full((len(samples[i].answer),), samples[i].temperature == 0) for i in wanted]
        ),
    )
