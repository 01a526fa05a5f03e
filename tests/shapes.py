# SPDX-License-Identifier: Apache-2.0
"""Sequoia's shapes, one at a time, and what they bring by the definition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from proposers.sequoia import OptimalTemplates
from proposers.template import Path


def optimal_template(acceptance: Sequence[float], size: int, depth: int) -> tuple[Path, ...]:
    """The shape of at most `size` nodes and `depth` levels with the most accepted tokens."""
    return OptimalTemplates(acceptance, size, depth).template(size, depth)


def expected_tokens(template: Sequence[Path], acceptance: Sequence[float]) -> float:
    """Tokens per step with this template: its accepted nodes and the target's own token."""
    return 1.0 + sum(float(np.prod([acceptance[rank] for rank in path])) for path in template)
