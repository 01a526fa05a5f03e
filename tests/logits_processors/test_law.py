# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logits_processors.law import SamplingLaw, logsumexp


@given(
    st.lists(st.floats(-20, 20), min_size=2, max_size=30),
    st.floats(0.1, 3.0),
    st.integers(0, 35),
    st.floats(0.05, 1.0),
)
def test_law_keeps_what_the_definitions_keep(row, temperature, top_k, top_p):
    logits = np.array(row)
    law = np.exp(SamplingLaw(temperature, top_k, top_p).log_probs(logits))
    assert law.sum() == pytest.approx(1.0, abs=1e-12)
    p = torch.softmax(torch.tensor(logits) / temperature, 0).numpy()
    kept = law > 0
    if top_k:
        assert kept.sum() <= max(top_k, (p >= np.sort(p)[::-1][min(top_k, p.size) - 1]).sum())
    # What is kept is kept in proportion, and nothing dropped beats anything kept.
    np.testing.assert_allclose(law[kept] * p[kept].sum(), p[kept], rtol=1e-9, atol=1e-15)
    if (~kept).any():
        assert p[~kept].max() <= p[kept].min() * (1 + 1e-9)


def test_top_p_is_the_smallest_sufficient_set():
    law = SamplingLaw(top_p=0.8).log_probs(np.log([0.5, 0.3, 0.15, 0.05]))
    assert np.isfinite(law).tolist() == [True, True, False, False]
    law = SamplingLaw(top_p=0.81).log_probs(np.log([0.5, 0.3, 0.15, 0.05]))
    assert np.isfinite(law).tolist() == [True, True, True, False]


def test_top_k_keeps_ties_and_applies_before_top_p():
    logits = np.log([0.4, 0.2, 0.2, 0.2])
    assert np.isfinite(SamplingLaw(top_k=2).log_probs(logits)).all()
    law = SamplingLaw(top_k=2, top_p=0.6).log_probs(np.log([0.4, 0.25, 0.2, 0.15]))
    # Of the two that top-k leaves, the first holds 0.4 / 0.65 > 0.6 alone.
    assert np.isfinite(law).tolist() == [True, False, False, False]


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.9999])
def test_top_p_over_a_large_vocabulary(scale, top_p):
    logits = np.round(np.random.default_rng(0).normal(size=5000) * scale, 1)  # many ties
    law = SamplingLaw(top_p=top_p).log_probs(logits)
    p = np.exp(SamplingLaw().log_probs(logits))
    order = np.argsort(-p, kind="stable")
    count = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
    assert set(np.flatnonzero(np.isfinite(law))) == set(order[:count])


def test_extreme_logits_stay_finite():
    law = SamplingLaw().log_probs(np.array([1e4, -1e4, 0.0], dtype=np.float32))
    assert law[0] == 0.0
    assert law[1] == -2e4
    assert logsumexp(np.full(3, -np.inf)) == -np.inf


@pytest.mark.parametrize(
    "arguments",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}],
)
def test_out_of_range_is_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        SamplingLaw(**arguments)


@pytest.mark.parametrize("row", [[-np.inf, -np.inf], [np.nan, 0.0], [np.inf, 0.0]])
def test_logits_without_a_law_are_refused(row):
    with pytest.raises(ValueError, match="no law"):
        SamplingLaw().log_probs(np.array(row))
