# SPDX-License-Identifier: Apache-2.0
"""Fitting the head, and what it would draft on texts that it has not seen.

At every place i of an answer the head starts from the target's state h_i and reads the text's own
next tokens x_{i+1}, ..., x_{i+K}; after each of them its distribution is compared with the target's
there, over the tokens that the head drafts and one class for all others (forward KL up to a
constant, as for a draft model in `distill`):

    loss = - sum_k [ sum_{t drafted} p_{i+k}(t) log q_k(t) + p_{i+k}(others) log q_k(others) ]

T is trained as a linear map of the target's embeddings, so that it has a row for tokens that the
texts do not have.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from proposers.hydra import HydraHead
from vllm_ext.distill.train import learning_rate
from vllm_ext.heads.features import Features

_WARMUP = 0.03
_CLIP = 1.0
_TRIED = 3  # tokens drafted side by side in the evaluation


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """How a head is made.

    Attributes:
        tokens: V, tokens that it drafts.
        inner: M, its width.
        depth: K, tokens that it is trained to draft behind each other.
        rows: places of a training step.
        rate: highest learning rate.
        seed: of the order and of what the weights begin with.
    """

    tokens: int = 4096
    inner: int = 576
    depth: int = 3
    rows: int = 1024
    rate: float = 1e-3
    seed: int = 0


def frequent(features: Features, vocab_size: int, count: int) -> Tensor:
    """The `count` tokens that the target expects most, int64, the most frequent first."""
    mass = torch.zeros(vocab_size)
    mass.index_add_(0, features.ids.flatten(), features.probs.flatten().float())
    return mass.topk(min(count, vocab_size)).indices


class _Model(nn.Module):
    """A head in training; its inputs are a linear map of the target's embeddings."""

    tokens: Tensor
    embedded: Tensor

    def __init__(self, tokens: Tensor, embeddings: Tensor, outputs: Tensor, inner: int) -> None:
        super().__init__()
        size = outputs.shape[1]
        self.register_buffer("tokens", tokens)
        self.register_buffer("embedded", embeddings / embeddings.pow(2).mean().sqrt())
        self.inner = nn.Parameter(torch.empty(inner, size))
        self.mixed = nn.Parameter(torch.empty(inner, embeddings.shape[1]))
        self.outer = nn.Parameter(torch.empty(size, inner))
        for matrix in (self.inner, self.mixed):
            nn.init.uniform_(
                matrix, -1 / math.sqrt(matrix.shape[1]), 1 / math.sqrt(matrix.shape[1])
            )
        nn.init.normal_(self.outer, std=0.25 / math.sqrt(inner))
        self.scale = nn.Parameter(torch.ones(size))
        self.gain = nn.Parameter(torch.ones(size))
        self.outputs = nn.Parameter(torch.cat([outputs, torch.zeros(1, size)]))
        self.bias = nn.Parameter(torch.zeros(len(tokens) + 1))

    def read(self, tokens: Tensor) -> Tensor:
        """Rows of T."""
        return functional.linear(self.embedded[tokens], self.mixed)

    def head(self) -> HydraHead:
        """Its tensors take gradients; it has no T, which would be made anew in each step."""
        return HydraHead(
            tokens=self.tokens,
            inner=self.inner,
            inputs=self.mixed.new_empty(0, len(self.mixed)),
            outer=self.outer,
            scale=self.scale,
            gain=self.gain,
            outputs=self.outputs,
            bias=self.bias,
        )


def fit(
    features: Features,
    tokens: Tensor,
    embeddings: Tensor,
    outputs: Tensor,
    settings: HeadSettings,
    budget: float,
    advance: Callable[[float, str], None],
    clock: Callable[[], float] = time.monotonic,
) -> HydraHead:
    """Train a head for `budget` seconds; at least one step is taken.

    The learning rate follows the time, so it ends at zero on a fast machine and on a slow one.

    Args:
        features: of the texts.
        tokens: that the head drafts, int64 [V].
        embeddings: of all tokens, [vocabulary, E].
        outputs: rows of the target's output layer for them, [V, D]; what the head's begin with.
        settings: of the head.
        budget: seconds.
        advance: called after each step with its seconds and where the training stands.
        clock: seconds, from any beginning.

    Returns:
        The head, float32, on the CPU.
    """
    torch.manual_seed(settings.seed)
    device, narrow = outputs.device, outputs.dtype == torch.bfloat16
    model = _Model(tokens.to(device), embeddings.float(), outputs.float(), settings.inner)
    model.to(device)
    with torch.no_grad():  # states of the size that the output layer is used to
        model.gain.fill_(features.hidden[:4096].float().pow(2).mean().sqrt().item())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    places = placed(features, tokens)
    able = torch.nonzero(features.left > 1).flatten()
    generator = torch.Generator().manual_seed(settings.seed)
    begin = last = clock()
    step, mean = 0, math.nan
    while step == 0 or last - begin < budget:
        progress = (last - begin) / budget if budget else 1.0
        rate = learning_rate(settings.rate, progress, _WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = able[torch.randint(len(able), (settings.rows,), generator=generator)]
        # As the target's own weights: a machine that runs those well runs these. Master weights
        # stay float32.
        with torch.autocast(device.type, torch.bfloat16, enabled=narrow):
            losses = _losses(model.head(), model.read, places, chosen, settings.depth)
            loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()
        step += 1
        first = losses[0].item()
        mean = first if step == 1 else 0.98 * mean + 0.02 * first
        now = clock()
        epoch = step * settings.rows / len(able)
        advance(now - last, f"step {step}, epoch {epoch:.1f}, loss {mean:.3f}")
        last = now
    with torch.no_grad():
        inputs = model.read(torch.arange(len(embeddings), device=device))
    made = replace(model.head(), inputs=inputs).tensors()
    return HydraHead(**{name: tensor.detach().cpu() for name, tensor in made.items()})


def placed(features: Features, tokens: Tensor) -> Features:
    """Features whose `ids` are places in the head's `tokens`; V stands for all other tokens."""
    largest = max(int(features.ids.max()), int(tokens.max()))
    place_of = torch.full((largest + 1,), len(tokens))
    place_of[tokens] = torch.arange(len(tokens))
    return replace(features, ids=place_of[features.ids])


def _losses(
    head: HydraHead,
    read: Callable[[Tensor], Tensor],
    places: Features,
    chosen: Tensor,
    depth: int,
) -> list[Tensor]:
    """Mean cross-entropy behind each of at most `depth` tokens that follow the chosen places.

    `places` are features as `placed` makes them.
    """
    known = len(head.tokens)
    device = head.inner.device
    states = places.hidden[chosen].to(device, torch.float32)
    losses = []
    for k in range(depth):
        live = places.left[chosen] > k + 1
        chosen, states = chosen[live], states[live.to(device)]
        if not len(chosen):
            break
        states = head.move(states, read(places.token[chosen + k].to(device)))
        log_q = head.logits(states).float().log_softmax(-1)
        ids, probs = places.ids[chosen + k + 1].to(device), places.probs[chosen + k + 1].to(device)
        named = probs.float() * (ids < known)
        others = (1 - named.sum(-1)).clamp(min=0)
        said = (log_q.gather(1, ids) * named).sum(-1) + others * log_q[:, -1]
        losses.append(-said.mean())
    return losses or [0 * states.sum()]


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a head drafts behind its k-th token, on texts of one kind.

    Attributes:
        places: where it was asked.
        first: the target's mean probability of its best token; on greedy texts, how often that is
            the target's best token.
        three: likewise of its three best tokens together.
        own: likewise of the target's own best token.
    """

    places: int
    first: float
    three: float
    own: float


@torch.inference_mode()
def judged(head: HydraHead, features: Features, depth: int) -> dict[str, list[Agreement]]:
    """Agreement on greedy and on sampled texts, behind 1 to `depth` of the text's own tokens."""
    places = placed(features, head.tokens)
    found: dict[str, list[Agreement]] = {}
    for name, greedy in (("greedy", True), ("sampled", False)):
        chosen = torch.nonzero((places.left > depth) & (places.greedy == greedy)).flatten()
        if not len(chosen):
            continue
        states = places.hidden[chosen].to(head.inner)
        found[name] = []
        for k in range(depth):
            states = head.step(states, places.token[chosen + k])
            best = head.logits(states)[:, :-1].topk(_TRIED).indices
            ids, probs = places.ids[chosen + k + 1], places.probs[chosen + k + 1].float()
            if greedy:  # whatever the probabilities: the best one is taken
                probs = torch.zeros_like(probs)
                probs[:, 0] = 1.0
            hits = torch.stack(
                [(probs * (ids == best[:, j : j + 1])).sum(-1) for j in range(_TRIED)]
            )
            found[name].append(
                Agreement(
                    len(chosen),
                    hits[0].mean().item(),
                    hits.sum(0).mean().item(),
                    probs[:, 0].mean().item(),
                )
            )
    return found
