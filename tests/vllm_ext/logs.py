# SPDX-License-Identifier: Apache-2.0
"""Log lines of the package, counted.

Not by pytest's ``caplog``: from version 9.2 on it attaches itself to loggers that do not propagate,
as vLLM's, so that a test which makes them propagate too sees each line twice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def logged(level: int) -> Iterator[list[str]]:
    """The lines of this level and above that are logged meanwhile."""
    logger = logging.getLogger("vllm.vllm_ext")
    handler, before = _Lines(), logger.level
    handler.setLevel(level)
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
