# SPDX-License-Identifier: Apache-2.0
"""Cutting a student out of a target: some of its layers, and all that is around them.

The student has the target's architecture, tokenizer, embeddings and output layer, so it loads
wherever the target does. Embeddings and output layer are shared and stay frozen while the layers
between them learn: they are most of a small student, and the target's are good already.

An early exit (Kangaroo, arXiv 2404.18911) keeps the target's lowest layers frozen too, and one
layer behind them learns to finish what they began. Kangaroo's adapter is an attention layer without
an MLP; a whole layer leaves the student a model of the target's class.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vllm_ext.cli.environment import fast_dtype
from vllm_ext.distill import grouped
from vllm_ext.distill.errors import DistillError
from vllm_ext.identity import TOKENIZER_FILES

_COPIED = (
    *TOKENIZER_FILES,
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
)


def load_target(folder: Path, device: torch.device) -> Any:
    """The target, for inference, in its own dtype where the device multiplies fast in that.

    That is any GPU, and for bfloat16 a CPU with instructions for it; other CPUs take float32.

    Raises:
        DistillError: if it cannot be loaded, or is not a decoder whose parts are found.
    """
    from transformers import AutoModelForCausalLM

    try:
        dtype = "auto" if device.type != "cpu" or is_fast(stored_dtype(folder)) else torch.float32
        target = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DistillError(f"target {folder} cannot be loaded: {error}") from error
    target = target.to(device).eval().requires_grad_(False)
    check_target(target)
    if device.type == "cpu":
        grouped.use(target)
    return target


def is_fast(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU computes in `dtype` faster than in float32."""
    return dtype == torch.bfloat16 and fast_dtype() == "bfloat16"


@torch.inference_mode()
def check_target(target: Any) -> None:
    """Refuse what the command does not know how to cut.

    Raises:
        DistillError: unless the target is embeddings, a list of layers, a norm and one linear
            output layer, and its logits are what `head_logits` computes.
    """
    name = type(target).__name__
    base: Any = getattr(target, "model", None)
    parts = all(hasattr(base, part) for part in ("layers", "norm", "embed_tokens"))
    head = target.get_output_embeddings()
    if not parts or not isinstance(head, nn.Linear):
        raise DistillError(
            f"{name} cannot be cut: only decoders with model.embed_tokens, model.layers, "
            "model.norm and a linear output layer can (Llama, Qwen, Mistral, Gemma and the like)"
        )
    tokens = torch.arange(min(8, target.config.vocab_size), device=head.weight.device)[None]
    hidden = base(tokens, use_cache=False).last_hidden_state
    logits = target(tokens, use_cache=False).logits.float()
    if not torch.allclose(logits, head_logits(target, hidden), rtol=1e-2, atol=1e-2):
        raise DistillError(
            f"{name} changes its logits behind the output layer in a way that is not known here"
        )


def head_logits(model: Any, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Logits of `tokens` (all if `None`) from final hidden states, float32 [..., tokens]."""
    head = model.get_output_embeddings()
    weight, bias = head.weight, head.bias
    if tokens is not None:
        weight = weight[tokens]
        bias = None if bias is None else bias[tokens]
    logits = nn.functional.linear(hidden, weight.to(hidden.dtype), bias).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def spread(layers: int, total: int) -> list[int]:
    """`layers` indices evenly over `total`, the first and the last among them (one: the first).

    Raises:
        DistillError: if that is not fewer layers than the target has, and at least one.
    """
    if not 1 <= layers < total:
        raise DistillError(
            f"{layers} layers: the draft must have fewer than the target, which has {total}; "
            f"give 1 to {total - 1}"
        )
    if layers == 1:
        return [0]
    return [round(i * (total - 1) / (layers - 1)) for i in range(layers)]


def early_exit(layers: int, total: int) -> list[int]:
    """The lowest `layers` - 1 of `total` layers, and the last one to begin the adapter with.

    Raises:
        DistillError: if that is not a layer and an adapter at least, and fewer than the target has.
    """
    if not 2 <= layers < total:
        raise DistillError(
            f"{layers} layers: an early exit has one of the target's {total} layers and an adapter "
            f"at least, and fewer layers than the target; give 2 to {total - 1}"
        )
    return [*range(layers - 1), total - 1]


def make_student(target: Any, picked: Sequence[int], frozen: int = 0) -> Any:
    """A float32 model of the target's class with the target's layers `picked`, in that order.

    Only its layers from `frozen` on and its final norm take gradients.

    Raises:
        DistillError: if the architecture gives a layer another shape at another depth.
    """
    config = student_config(target.config, picked)
    student = type(target)(config).float()
    state = _picked_state(target.state_dict(), picked)
    try:
        student.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise DistillError(f"{type(target).__name__} cannot be cut: {error}") from error
    tied = set(student.state_dict()) - set(state)
    if tied - set(student._tied_weights_keys or ()):
        raise DistillError(f"{type(target).__name__} cannot be cut: no weights for {sorted(tied)}")
    student.tie_weights()
    student.requires_grad_(False)
    student.model.layers[frozen:].requires_grad_(True)
    student.model.norm.requires_grad_(True)
    return student.to(target.device)


def student_config(config: Any, picked: Sequence[int]) -> Any:
    """The target's configuration for the layers `picked`: lists with an entry per layer too."""
    made = copy.deepcopy(config)
    total = config.num_hidden_layers
    for key, value in config.to_dict().items():
        # Lists of token ids can have that length by chance.
        if isinstance(value, list) and len(value) == total and not key.endswith("token_id"):
            setattr(made, key, [value[i] for i in picked])
    made.num_hidden_layers = len(picked)
    return made


def save_student(student: Any, source: Path, out: Path, dtype: torch.dtype) -> None:
    """Write a model folder: weights in `dtype`, configuration, and the target's tokenizer."""
    trained = copy.deepcopy(student).to(dtype)
    trained.save_pretrained(out)
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that the weights in `folder` are meant to have, float32 if it is not said."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _picked_state(state: dict[str, Tensor], picked: Sequence[int]) -> dict[str, Tensor]:
    prefix = "model.layers."
    kept = {name: value for name, value in state.items() if not name.startswith(prefix)}
    for new, old in enumerate(picked):
        layer = f"{prefix}{old}."
        kept |= {
            f"{prefix}{new}.{name.removeprefix(layer)}": value
            for name, value in state.items()
            if name.startswith(layer)
        }
    return kept
