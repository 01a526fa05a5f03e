# SPDX-License-Identifier: Apache-2.0
"""One step of a Hydra head (see `hydra`) on the CPU, for a few states at a time.

Reading the matrices is what it costs, so they are kept in 8 bits (`rounded`). Where Numba is
installed (it comes with vLLM) the whole step is compiled: between matrices that fit into caches,
NumPy spends its time on calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from proposers.hydra import HydraHead
from proposers.rounded import RoundedMatrix

_EPSILON = np.float32(np.finfo(np.float32).eps)
_HALF = np.float32(0.5)
_ONE = np.float32(1.0)

Floats: TypeAlias = NDArray[np.float32]


class HydraKernel:
    """A head ready to be stepped.

    Args:
        head: the network.

    Attributes:
        size: D, of its states.
        vocab_size: tokens that it can read.
    """

    def __init__(self, head: HydraHead) -> None:
        self._inputs = head.inputs
        self._inner = RoundedMatrix(floats(head.inner) * floats(head.scale))
        self._outer = RoundedMatrix(floats(head.outer))
        self._outputs = RoundedMatrix(floats(head.outputs))
        self._gain = floats(head.gain)
        self._bias = floats(head.bias)
        self.size = len(self._gain)
        self.vocab_size = len(head.inputs)
        compiled()  # now, and not in the first step

    def step(
        self, states: Floats, tokens: list[int], powers: Floats
    ) -> tuple[Floats, Floats, Floats]:
        """States after one more token each, and what follows them.

        Args:
            states: float32 [N, D].
            tokens: N ids.
            powers: float32 [N]; q is sharpened to softmax(power * logits).

        Returns:
            The new states, float32 [N, D]; power * logits, float32 [N, V + 1]; and the logarithms
            of their sums of exponentials, float32 [N].

        Raises:
            ValueError: if the states are not of size D.
        """
        if states.shape[1] != self.size:
            raise ValueError(f"states of size {states.shape[1]} for a head of size {self.size}")
        read = floats(self._inputs[tokens])
        run = compiled()
        if run is None:
            return self._plain_step(states, read, powers)
        moved = np.empty_like(states)
        logits = np.empty((len(states), len(self._bias)), np.float32)
        norms = np.empty(len(states), np.float32)
        run(
            *(self._inner.values, self._inner.scales),
            *(self._outer.values, self._outer.scales),
            *(self._outputs.values, self._outputs.scales),
            *(self._gain, self._bias, states, read, powers, moved, logits, norms),
        )
        return moved, logits, norms

    def _plain_step(
        self, states: Floats, read: Floats, powers: Floats
    ) -> tuple[Floats, Floats, Floats]:
        normed = _normed(states)
        mixed = self._inner.times(normed) + read
        mixed /= 1 + np.exp(-mixed)  # silu
        moved = _normed(normed * _HALF + self._outer.times(mixed)) * self._gain
        logits = (self._outputs.times(moved) + self._bias) * powers[:, None]
        return moved, logits, torch.from_numpy(logits).logsumexp(-1).numpy()


def floats(tensor: Tensor) -> Floats:
    """A tensor on the CPU as float32."""
    array: Floats = tensor.float().numpy()
    return array


def _normed(rows: Floats) -> Floats:
    normed: Floats = rows / np.sqrt((rows * rows).mean(axis=1, keepdims=True) + _EPSILON)
    return normed


@functools.cache
def compiled() -> Callable[..., None] | None:
    """The compiled step, or `None` without Numba; the first call takes some seconds."""
    try:
        import numba
    except ImportError:
        return None
    # Sums may be reordered, so that they vectorise; every machine then has an order of its own.
    fast = {"contract", "nsz", "reassoc"}
    inline = numba.njit(fastmath=fast, inline="always")
    matrix = "i1[:,::1], f4[::1]"
    rows = "f4[:,::1]"
    signature = (
        f"void({matrix}, {matrix}, {matrix}, f4[::1], f4[::1], "
        f"{rows}, {rows}, f4[::1], {rows}, {rows}, f4[::1])"
    )
    multiply, normalise = inline(_multiply), inline(_normalise)

    def step(
        inner: Any,
        inner_scales: Any,
        outer: Any,
        outer_scales: Any,
        outputs: Any,
        output_scales: Any,
        gain: Any,
        bias: Any,
        states: Any,
        read: Any,
        powers: Any,
        moved: Any,
        logits: Any,
        norms: Any,
    ) -> None:
        count, size = states.shape
        normed = np.empty((count, size), np.float32)
        mixed = np.empty((count, inner.shape[0]), np.float32)
        for n in range(count):
            normalise(states[n], normed[n])
        multiply(inner, inner_scales, normed, mixed)
        for n in range(count):
            for m in range(mixed.shape[1]):
                x = mixed[n, m] + read[n, m]
                mixed[n, m] = x / (_ONE + np.exp(-x))
        multiply(outer, outer_scales, mixed, moved)
        for n in range(count):
            for d in range(size):
                moved[n, d] += normed[n, d] * _HALF
            normalise(moved[n], moved[n])
            for d in range(size):
                moved[n, d] *= gain[d]
        multiply(outputs, output_scales, moved, logits)
        for n in range(count):
            top = np.float32(-np.inf)
            for v in range(logits.shape[1]):
                x = (logits[n, v] + bias[v]) * powers[n]
                logits[n, v] = x
                top = max(top, x)
            total = np.float32(0)
            for v in range(logits.shape[1]):
                total += np.exp(logits[n, v] - top)
            norms[n] = top + np.log(total)

    made: Callable[..., None] = numba.njit(signature, fastmath=fast)(step)
    return made


def _multiply(values: Any, scales: Any, vectors: Any, product: Any) -> None:
    for i in range(values.shape[0]):
        row, scale = values[i], scales[i]
        for n in range(vectors.shape[0]):
            vector = vectors[n]
            total = np.float32(0)
            for k in range(row.shape[0]):
                total += np.float32(row[k]) * vector[k]
            product[n, i] = total * scale


def _normalise(row: Any, normed: Any) -> None:
    square = np.float32(0)
    for d in range(row.shape[0]):
        square += row[d] * row[d]
    factor = _ONE / np.sqrt(square / np.float32(row.shape[0]) + _EPSILON)
    for d in range(row.shape[0]):
        normed[d] = row[d] * factor
