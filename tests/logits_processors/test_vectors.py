# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from logits_processors.vectors import exp_, log_


@pytest.mark.parametrize("size", [0, 1, 2047, 2048, 50_000])
def test_in_place_and_accurate_at_any_length(size):
    values = np.random.default_rng(size).uniform(-700.0, 700.0, size)
    given = values.copy()
    assert exp_(values) is values
    np.testing.assert_allclose(values, np.exp(given), rtol=1e-14)
    assert log_(values) is values
    np.testing.assert_allclose(values, given, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [2, 4096])
def test_the_ends_of_the_range(size):
    values = np.full(size, -np.inf)
    assert not exp_(values).any()
    assert (log_(values) == -np.inf).all()
