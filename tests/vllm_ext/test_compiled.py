# SPDX-License-Identifier: Apache-2.0
"""Numerical pieces of the compiled kernels against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_ext.compiled import LOWEST, bits_of, exp, exponentiate, highest_of, number_of


def test_exp() -> None:
    arguments = np.concatenate([np.linspace(-86.99, 0, 20001), -(10.0 ** np.arange(-30.0, 0))])
    given = arguments.astype(np.float32)
    np.testing.assert_allclose([exp(x) for x in given], np.exp(given.astype(np.float64)), rtol=4e-7)


def test_exp_of_what_is_too_small_is_zero() -> None:
    assert exp(np.float32(LOWEST - 1)) == 0.0
    assert exp(np.float32(-1e30)) == 0.0


def test_exponentiate() -> None:
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    expected = np.exp(values.astype(np.float64) - 5.0)
    given = values.copy()
    total = exponentiate(values, 7, 900, np.float32(5.0))
    changed = slice(7, 907)
    np.testing.assert_allclose(values[changed], expected[changed], rtol=1e-6)  # rounded difference
    np.testing.assert_allclose(total, expected[changed].sum(), rtol=1e-6)
    np.testing.assert_array_equal(np.delete(values, changed), np.delete(given, changed))


def test_highest() -> None:
    values = np.random.default_rng(0).normal(size=300).astype(np.float32)
    for start, n in [(0, 300), (3, 64), (10, 1)]:
        assert highest_of(values, start, n) == values[start : start + n].max()
    negative = -np.abs(values)
    negative[7] = -np.inf
    assert highest_of(negative, 0, 300) == negative.max()
    assert highest_of(negative, 7, 1) == -np.inf


def test_bits_there_and_back() -> None:
    for x in np.float32([0.0, 1.0, -2.5, 1e-30, 3e38]):
        assert _there_and_back(x) == x
    assert _bits(np.float32(1.0)) == 0x3F800000


def _compiled():  # type: ignore[no-untyped-def]
    import numba

    @numba.njit
    def there_and_back(x):  # type: ignore[no-untyped-def]
        return number_of(np.int32(bits_of(x)))

    @numba.njit
    def bits(x):  # type: ignore[no-untyped-def]
        return bits_of(x)

    return there_and_back, bits


_there_and_back, _bits = _compiled()


def test_what_is_compiled_anew_is_seen() -> None:
    """Control of the engine test that nothing is compiled while requests wait."""
    pytest.importorskip("vllm")
    from tests.vllm_ext.mutants import compiled_kernels

    values = np.zeros(8, np.float32)
    highest_of(values, 0, 4)
    before = compiled_kernels()
    highest_of(values, 0, 8)
    assert compiled_kernels() == before
    highest_of(values[::2], 0, 4)  # another sort of array
    assert any("highest_of" in kernel for kernel in compiled_kernels() - before)
