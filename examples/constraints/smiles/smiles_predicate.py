# SPDX-License-Identifier: Apache-2.0
"""The predicate ``smiles``: one molecule in SMILES, checked while it is written.

``partialsmiles`` judges unfinished SMILES by syntax, valence and aromaticity, of which no grammar
knows the last two. One space may come first, because a model writes one after a colon.
"""

from __future__ import annotations

import partialsmiles  # type: ignore[import-untyped]


class SmilesPredicate:
    """The language of valid SMILES.

    Args:
        argument: must be empty.

    Raises:
        ValueError: an argument was given.
    """

    def __init__(self, argument: str = "") -> None:
        if argument:
            raise ValueError(f"smiles takes no argument, given {argument!r}")

    def prefix(self, text: str) -> bool:
        """Tell whether ``text`` may become a molecule."""
        smiles = text.removeprefix(" ")
        return not smiles or self._parses(smiles, partial=True)

    def complete(self, text: str) -> bool:
        """Tell whether ``text`` is a molecule."""
        smiles = text.removeprefix(" ")
        return bool(smiles) and self._parses(smiles, partial=False)

    @staticmethod
    def _parses(smiles: str, *, partial: bool) -> bool:
        # Its parser also reads reactions, and takes white space for the end of the text.
        if not smiles.isascii() or any(c.isspace() or c == ">" for c in smiles):
            return False
        try:
            partialsmiles.ParseSmiles(smiles, partial=partial)
        except (partialsmiles.Error, IndexError):  # it looks behind the end of ``C%``
            return False
        return True
