# SPDX-License-Identifier: Apache-2.0
"""Weights that a draft model has in common with its target, held once.

A draft that was cut out of its target (`vllm-ext distill`, `self_draft`) has the target's
embeddings, an early exit (Kangaroo, arXiv 2404.18911) its lower layers too. Tensors are compared,
not names of files, so nothing has to be declared and nothing can be shared wrongly. What a kernel
has packed for itself, as vLLM's linear layers are on a CPU, is no longer there to be compared and
is held twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

_LAYER = re.compile(r"\.\d+\.")


@torch.inference_mode()
def share_equal_weights(draft: nn.Module, target: nn.Module) -> int:
    """Let parameters of `draft` lie in the memory of equal ones of `target`.

    Compared are contiguous parameters of the same name but for the number of their layer, shape,
    dtype and device, bit by bit: not every dtype knows equality.

    Returns:
        bytes of `draft` that are held no longer.
    """
    theirs: dict[object, list[nn.Parameter]] = {}
    for name, parameter in _held(target):
        theirs.setdefault(_kind(name, parameter), []).append(parameter)
    saved = 0
    for name, parameter in _held(draft):
        for candidate in theirs.get(_kind(name, parameter), ()):
            if parameter.data_ptr() != candidate.data_ptr() and _equal(parameter, candidate):
                parameter.data = candidate.data
                saved += parameter.numel() * parameter.element_size()
                break
    return saved


def _held(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        if parameter.numel() and parameter.is_contiguous() and not parameter.is_meta:
            yield name, parameter


def _kind(name: str, parameter: nn.Parameter) -> object:
    return _LAYER.sub(".*.", name), parameter.shape, parameter.dtype, parameter.device


def _equal(one: nn.Parameter, other: nn.Parameter) -> bool:
    ours, theirs = (parameter.data.flatten().view(torch.uint8) for parameter in (one, other))
    # The first bytes tell nearly all that differ.
    return torch.equal(ours[:4096], theirs[:4096]) and torch.equal(ours, theirs)
