# SPDX-License-Identifier: Apache-2.0
"""A predicate in a package of its own: "40, 35, 25" for the argument "100"."""

from __future__ import annotations

import re

NUMBER = "[1-9][0-9]{0,8}"
UNFINISHED = re.compile(f"({NUMBER}, )*({NUMBER},?)?")
FINISHED = re.compile(f"({NUMBER}, )*{NUMBER}")


class SumsTo:
    """Lists of numbers whose sum is the argument."""

    def __init__(self, argument: str) -> None:
        if not re.fullmatch(NUMBER, argument):
            raise ValueError(f"a number from 1 to 999999999 is needed, given {argument!r}")
        self._total = int(argument)

    def prefix(self, text: str) -> bool:
        """Whether some valid text begins with ``text``."""
        fits = UNFINISHED.fullmatch(text) and self._sum(text) < self._total
        return bool(fits) or self.complete(text)

    def complete(self, text: str) -> bool:
        """Whether ``text`` is valid as it stands."""
        return bool(FINISHED.fullmatch(text)) and self._sum(text) == self._total

    @staticmethod
    def _sum(text: str) -> int:
        return sum(map(int, re.findall("[0-9]+", text)))
