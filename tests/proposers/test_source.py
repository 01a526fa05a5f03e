# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np

from proposers import VerifiedRows


def test_cleaned_drops_rows_and_successors_outside_the_vocabulary() -> None:
    rows = VerifiedRows(
        np.array([[1, 2], [1, -1], [1, 10], [-5, 9]], np.int64),
        np.array([[3, 4, 10], [3, 4, 5], [3, 4, 5], [-1, 4, 5]], np.int64),
        np.array([[0.5, 0.2, 0.1], [0.5, 0.2, 0.1], [0.5, 0.2, 0.1], [0.5, np.nan, 0.1]]).astype(
            np.float32
        ),
        np.array([7, 8, 9, 6], np.int64),
    )
    clean = rows.cleaned(vocab_size=10)
    assert clean.contexts.tolist() == [[1, 2], [-5, 9]]
    assert clean.namespaces.tolist() == [7, 6]
    expected = np.array([[0.5, 0.2, 0.0], [0.0, 0.0, 0.1]], np.float32)
    assert np.array_equal(clean.top_probs, expected)
    assert len(clean) == 2
