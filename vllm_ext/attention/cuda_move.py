# SPDX-License-Identifier: Apache-2.0
"""KV commit on a GPU: accepted nodes move within the caches, one launch per kind of layer.

What the stock writer has put into a tree row's slot is what belongs into its final one, bit for
bit, so nothing has to be kept during the forward pass. At start-up the launch is compared with
torch on scratch caches; if it fails, nodes are kept and written anew, as on other devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_ext.attention.cuda_selftest import scratch_like
from vllm_ext.attention.tree_launch import key_value_views
from vllm_ext.attention.triton_move import Caches, move_paths
from vllm_ext.worker.commit import displaced
from vllm_ext.worker.step import AttentionStep

logger = init_logger("vllm.vllm_ext")

_TRIED = ((1, 3, 6, 7), (0, 2, 5))  # paths of the self-test, of two requests
_TRIED_ROWS = 9
_FIRST_SLOT = 3  # so that pages end within a request


@dataclass(slots=True)
class _Kind:
    """Layers with one slot mapping and caches of one shape."""

    layers: list[Any]
    caches: Caches | None = None
    addresses: tuple[int, ...] = ()

    def current(self) -> Caches:
        """Where the caches are now: vLLM may allocate them anew."""
        addresses = tuple(layer.kv_cache.data_ptr() for layer in self.layers)
        if self.caches is None or addresses != self.addresses:
            self.caches, self.addresses = Caches.of(list(map(_views, self.layers))), addresses
        return self.caches


class CacheMover:
    """Commits accepted nodes of all layers of a model.

    Args:
        groups: names of the layers that share a slot mapping, for each such group.
        layers: attention layers by name.

    Raises:
        ValueError: a cache whose layout is not known.
    """

    def __init__(self, groups: Sequence[Sequence[str]], layers: Mapping[str, Any]) -> None:
        self._kinds: list[tuple[str, _Kind]] = []  # with the name of a layer
        for names in groups:
            kinds: dict[Any, _Kind] = {}
            for name in names:
                layer = layers[name]
                if getattr(layer.impl, "kv_sharing_target_layer_name", None) is not None:
                    continue  # another layer's cache, which moves once
                keys, _ = _views(layer)
                kind = (keys.shape, keys.stride(), keys.dtype)
                if kind not in kinds:
                    kinds[kind] = _Kind([])
                    self._kinds.append((name, kinds[kind]))
                kinds[kind].layers.append(layer)

    def commit(
        self,
        step: AttentionStep,
        paths: Sequence[Sequence[int]],
        slot_mappings: Mapping[str, torch.Tensor],
    ) -> None:
        """As `worker.commit.commit`."""
        packed, ends = _packed(step, paths)
        count = ends[-1]
        if not count:
            return
        host = torch.tensor([*packed[0], *packed[1], *ends], dtype=torch.int64)
        device = next(iter(slot_mappings.values())).device
        if device.type == "cuda":
            host = host.pin_memory()
        sent = host.to(device, non_blocking=True)
        moves, starts = sent[: 2 * count].view(2, count), sent[2 * count :]
        for name, kind in self._kinds:
            move_paths(kind.current(), slot_mappings[name], moves, starts)

    def why_not(self) -> str | None:
        """Compare with torch on scratch caches; what is wrong, or ``None``."""
        for name, kind in self._kinds:
            scratch = [_scratch(kind.layers[0], seed) for seed in range(2)]
            wanted = [_expected(*views) for views in scratch]
            slots, moves, starts = _trial(scratch[0][0].device)
            move_paths(Caches.of(scratch), slots, moves, starts)
            for views, both in zip(scratch, wanted, strict=True):
                for view, bits in zip(views, both, strict=True):
                    if not torch.equal(_bits(view), bits):
                        return f"nodes do not arrive where they belong in layer {name}"
        return None


def make_mover(groups: Sequence[Sequence[str]], layers: Mapping[str, Any]) -> CacheMover | None:
    """A mover that has passed its test, or ``None``, with the reason in the log."""
    try:
        mover = CacheMover(groups, layers)
        reason = mover.why_not()
    except Exception as error:  # a kernel that does not compile must not stop the engine
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        logger.warning("vllm-ext: accepted nodes are written layer by layer (%s)", reason)
        return None
    return mover


def _packed(
    step: AttentionStep, paths: Sequence[Sequence[int]]
) -> tuple[tuple[list[int], list[int]], list[int]]:
    """Rows of the batch that go to the slots of others, and where each path's moves begin."""
    sources: list[int] = []
    targets: list[int] = []
    ends = [0]
    for tree, moves in zip(step.trees, displaced(step, paths), strict=True):
        if moves:
            sources += [tree.start + row for row, _ in moves]
            targets += [tree.start + depth for _, depth in moves]
            ends.append(len(sources))
    return (sources, targets), ends


def _views(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return key_value_views(layer.kv_cache, layer.impl.head_size, layer.impl.kv_cache_dtype)


def _bits(view: torch.Tensor) -> torch.Tensor:
    return view.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[view.element_size()])


def _scratch(layer: Any, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of random bits, laid out as those of `layer`."""
    page = _views(layer)[0].shape[1]
    cache = scratch_like(layer.kv_cache, -(-(_FIRST_SLOT + len(_TRIED) * _TRIED_ROWS) // page))
    views = key_value_views(cache, layer.impl.head_size, layer.impl.kv_cache_dtype)
    chance = torch.Generator().manual_seed(seed)
    for view in views:
        bits = _bits(view)
        drawn = torch.randint(0, 100, bits.shape, generator=chance)
        bits.copy_(drawn.to(bits.device, bits.dtype))
    return views


def _trial(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slots, moves and starts of `_TRIED`, for requests that lie one behind the other."""
    moves = [
        (first + node + 1, first + depth)
        for first, path in zip((0, _TRIED_ROWS), _TRIED, strict=True)
        for depth, node in enumerate(path, start=1)
    ]
    slots = _FIRST_SLOT + torch.arange(len(_TRIED) * _TRIED_ROWS, device=device)
    starts = torch.tensor([0, len(_TRIED[0]), len(moves)], device=device)
    return slots, torch.tensor(moves, device=device).T.contiguous(), starts


def _expected(keys: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
    """What `_trial` makes of them, all read before anything is written."""
    slots, moves, _ = _trial(keys.device)
    page = keys.shape[1]
    source, target = slots[moves[0]], slots[moves[1]]
    made = []
    for view in (keys, values):
        bits = _bits(view).clone()
        read = bits[source // page, source % page]
        bits[target // page, target % page] = read
        made.append(bits)
    return made
