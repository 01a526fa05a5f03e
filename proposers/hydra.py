# SPDX-License-Identifier: Apache-2.0
"""A draft head on the target's own last hidden state (Hydra, arXiv 2402.05109).

The target's state h at its newest verified row is there anyway, and knows far more of the text than
any table. From h and the token x_1 that was drawn from it, a small recurrent head (one for all
depths, as in ReDrafter, arXiv 2403.09919) says what the target will say next:

    s_0 = h,    s_k = norm(norm(s_{k-1}) / 2 + C silu(A norm(s_{k-1}) + T[x_k])) * g,
    q(. | x_1..x_k) = softmax(O s_k + b)

with rows of O for the V most frequent tokens only, and one more for all others (the output layer is
most of what a small draft costs: FR-Spec, arXiv 2502.14856); T has a row for every token. The
target's layers do not run, nothing is cached, and a drafted path costs one small step per node.

`HydraHead` is the network and its file; `hydra_source` drafts from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from proposers import stored


class HydraError(stored.StoredError):
    """A head cannot be used; the message says why and what to do."""


KIND = stored.Kind("vllm-ext-head", "1", "draft head", "vllm-ext head", 1 << 32, HydraError)


@dataclass(frozen=True, slots=True)
class HydraHead:
    """The network.

    Attributes:
        tokens: int64 [V], distinct ids of the tokens that the head drafts.
        inner: A, [M, D].
        inputs: T, [vocabulary, M].
        outer: C, [D, M].
        scale: [D], of the state before A.
        gain: g, [D].
        outputs: O, [V + 1, D]; the last row stands for all other tokens.
        bias: b, [V + 1].
    """

    tokens: Tensor
    inner: Tensor
    inputs: Tensor
    outer: Tensor
    scale: Tensor
    gain: Tensor
    outputs: Tensor
    bias: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def step(self, states: Tensor, tokens: Tensor) -> Tensor:
        """States [N, D] after one more token each, given by its id, int64 [N]."""
        return self.move(states, self.inputs[tokens])

    def move(self, states: Tensor, read: Tensor) -> Tensor:
        """As `step`, with the tokens' rows of T, [N, M]."""
        normed = functional.rms_norm(states, states.shape[-1:])
        mixed = functional.linear(normed * self.scale, self.inner) + read
        moved = normed / 2 + functional.linear(functional.silu(mixed), self.outer)
        return functional.rms_norm(moved, moved.shape[-1:]) * self.gain

    def logits(self, states: Tensor) -> Tensor:
        """Of the tokens and of "another", [N, V + 1]."""
        return functional.linear(states, self.outputs, self.bias)

    def save(self, path: Path, identity: Mapping[str, str]) -> None:
        """Write the file, whole or not at all.

        Args:
            path: of the file; its folder is made.
            identity: what the head belongs to; `load` compares it.
        """
        from safetensors.torch import save

        tensors = {name: tensor.contiguous() for name, tensor in self.tensors().items()}
        stored.write(path, save(tensors, metadata=KIND.metadata(identity)))

    @classmethod
    def load(
        cls, path: Path, identity: Mapping[str, str], vocab_size: int, hidden_size: int
    ) -> HydraHead:
        """Read a file that `save` wrote.

        Args:
            path: of the file.
            identity: what the head must belong to.
            vocab_size: every token id must lie below it.
            hidden_size: D.

        Raises:
            HydraError: if it cannot be read, is no such head, is damaged, or belongs to another
                model.
        """
        from safetensors.torch import load

        tensors = stored.load(path, KIND, identity, load)
        return _checked(path, tensors, vocab_size, hidden_size)


def _checked(
    path: Path, tensors: Mapping[str, Tensor], vocab_size: int, hidden_size: int
) -> HydraHead:
    """The head, if the tensors are what `HydraHead` promises."""
    names = [field.name for field in fields(HydraHead)]
    if sorted(tensors) != sorted(names):
        raise HydraError(f"draft head {path}: holds {sorted(tensors)}, not {sorted(names)}")
    head = HydraHead(**tensors)
    if head.tokens.ndim != 1 or head.inner.ndim != 2 or not head.inner.numel():
        raise HydraError(
            f"draft head {path}: tokens and inner have the shapes {tuple(head.tokens.shape)} and "
            f"{tuple(head.inner.shape)}, not (V,) and (M, D)"
        )
    known, inner = len(head.tokens), len(head.inner)
    shapes = {
        "tokens": (known,),
        "inner": (inner, hidden_size),
        "inputs": (vocab_size, inner),
        "outer": (hidden_size, inner),
        "scale": (hidden_size,),
        "gain": (hidden_size,),
        "outputs": (known + 1, hidden_size),
        "bias": (known + 1,),
    }
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise HydraError(
                f"draft head {path}: {name} has the shape {tuple(tensor.shape)}, not {shape}"
            )
        if name != "tokens" and not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise HydraError(f"draft head {path}: {name} holds values that are no finite numbers")
    tokens = head.tokens
    if tokens.dtype != torch.int64 or not known or tokens.min() < 0 or tokens.max() >= vocab_size:
        raise HydraError(f"draft head {path}: its token ids are out of range")
    if len(set(tokens.tolist())) != known:
        raise HydraError(f"draft head {path}: a token occurs twice")
    return head
