# SPDX-License-Identifier: Apache-2.0
"""A regular expression without its look-around: a wider language that is easier to check.

A partial match stops as soon as a look-ahead runs into the end of the text, before the rest of the
expression has been looked at: ``(?=.*[0-9])[a-z]+[0-9]`` takes ``!!`` for a viable prefix. Whatever
matches the expression also matches it with every look-around taken out, so a prefix has to be
viable there too.
"""

from __future__ import annotations

_LOOK_AROUND = ("(?=", "(?!", "(?<=", "(?<!")
_NO_CAPTURE = ("(?:", "(?>", "(?|", "(?#", *_LOOK_AROUND)


def without_look_around(source: str) -> str | None:
    """Return ``source`` with every look-around replaced by nothing.

    Returns:
        ``None`` where that could change the rest: a look-around that captures (later groups would
        be renumbered), or one that is the condition of a conditional.
    """
    kept: list[str] = []
    position = 0
    while position < len(source):
        end = _token_end(source, position)
        if source.startswith(_LOOK_AROUND, position):
            if "".join(kept).endswith("(?"):
                return None
            group = _group_end(source, position)
            if group is None or _captures(source[position:group]):
                return None
            end = group
            # An empty group, so that a quantifier behind the look-around still has its subject.
            kept.append("(?:)")
        else:
            kept.append(source[position:end])
        position = end
    return "".join(kept)


def _token_end(source: str, start: int) -> int:
    """Return where the escape, the bracketed class or the single character at ``start`` ends."""
    if source[start] == "\\":
        return min(start + 2, len(source))
    if source[start] != "[":
        return start + 1
    position = start + 1 + source.startswith("^", start + 1)
    position += source.startswith("]", position)
    while position < len(source) and source[position] != "]":
        position = _token_end(source, position)
    return min(position + 1, len(source))


def _group_end(source: str, start: int) -> int | None:
    """Return where the group that opens at ``start`` ends; ``None`` if it does not."""
    depth, position = 0, start
    while position < len(source):
        depth += (source[position] == "(") - (source[position] == ")")
        position = _token_end(source, position)
        if depth == 0:
            return position
    return None


def _captures(source: str) -> bool:
    """Tell whether a group inside ``source`` captures."""
    position = 0
    while position < len(source):
        if source[position] == "(" and not source.startswith(_NO_CAPTURE, position):
            return True
        position = _token_end(source, position)
    return False
