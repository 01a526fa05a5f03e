# SPDX-License-Identifier: Apache-2.0
"""What a constraint is: the one interface between the samplers and the engines that check text.

A constraint is a set of token strings seen from a growing prefix. Samplers ask it lazily
(``allows``) or all at once (``mask``), and only committed tokens change it (``accept``). A compiled
constraint is immutable and shared by every request that uses it; its states are per request.
"""

from __future__ import annotations

import hashlib
import json
from typing import Protocol, Self, runtime_checkable

from .bitmask import Bitmask, pack
from .vocabulary import Vocabulary


class ConstraintError(ValueError):
    """A constraint was refused, with what was given, what is allowed and what to do."""


class ConstraintRuntimeError(RuntimeError):
    """A constraint could not be evaluated while generating: end the request with an error."""


@runtime_checkable
class Constraint(Protocol):
    """The state of one request under a constraint.

    Once an end-of-text token has been accepted nothing else is allowed until it is rolled back.
    """

    @property
    def num_accepted(self) -> int:
        """Number of tokens accepted and not rolled back, the end-of-text token included."""

    def allows(self, token: int) -> bool:
        """Tell whether ``accept(token)`` would succeed, without changing the state."""

    def accept(self, token: int) -> bool:
        """Append ``token``; on ``False`` the state is unchanged.

        End-of-text tokens are accepted exactly where ``complete()`` holds.

        Raises:
            ConstraintRuntimeError: the engine gave up (a time or size limit of its own).
        """

    def rollback(self, count: int) -> None:
        """Take back the last ``count`` accepted tokens.

        Raises:
            ValueError: ``count`` is negative or exceeds ``num_accepted``.
        """

    def mask(self) -> Bitmask | None:
        """Return which tokens ``allows`` holds for, ``None`` where only token checks are cheap."""

    def full_mask(self) -> Bitmask:
        """Return which tokens ``allows`` holds for, at whatever cost; ``int32[ceil(V / 32)]``."""

    def complete(self) -> bool:
        """Tell whether the text so far is a member of the language."""

    def reset(self) -> None:
        """Go back to the empty prefix."""

    def fork(self) -> Self:
        """Return an independent copy in the same state."""


@runtime_checkable
class CompiledConstraint(Protocol):
    """An immutable constraint from which any number of request states can be started."""

    @property
    def key(self) -> str:
        """Hex digest that identifies the constraint together with its vocabulary."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The table that the constraint was compiled for."""

    def start(self) -> Constraint:
        """Return a new state at the empty prefix."""


def check_rollback(count: int, accepted: int) -> None:
    """Raise ``ValueError`` unless ``0 <= count <= accepted``."""
    if not 0 <= count <= accepted:
        raise ValueError(
            f"rollback({count}): only 0 to {accepted} accepted tokens can be taken back"
        )


def scan(constraint: Constraint, vocabulary: Vocabulary) -> Bitmask:
    """Build the full mask from token checks alone.

    The language of a prefix check is prefix-closed, so once a token is refused every token that
    begins with its bytes is refused too; in byte order those follow it without a gap. A vocabulary
    that holds single bytes thereby costs a few hundred checks where little is allowed.

    Returns:
        ``int32[ceil(V / 32)]``.
    """
    allowed = [eos for eos in vocabulary.eos_ids if constraint.allows(eos)]
    refused: bytes | None = None
    for text, token in vocabulary.by_bytes:
        if refused is not None and text.startswith(refused):
            continue
        if constraint.allows(token):
            allowed.append(token)
        else:
            refused = text
    return pack(allowed, vocabulary.size)


def refuse_if_empty(compiled: CompiledConstraint, what: str) -> None:
    """Raise ``ConstraintError`` when no token at all can follow the empty prefix."""
    if not compiled.start().full_mask().any():
        raise ConstraintError(
            f"{what} allows no first token: its language is empty over this vocabulary. "
            "Give every rule an alternative that ends, and check that it can be spelled in tokens."
        )


def place(source: str, offset: int) -> str:
    """Return where the character at ``offset`` of ``source`` stands, in the words of messages."""
    line_start = source.rfind("\n", 0, offset) + 1
    line = source.count("\n", 0, line_start) + 1
    return f"line {line}, column {offset - line_start + 1}"


def constraint_key(vocabulary: Vocabulary, *parts: str) -> str:
    """Return the hex digest that names the constraint ``parts`` over ``vocabulary``."""
    text = json.dumps([vocabulary.digest, *parts])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
