# SPDX-License-Identifier: Apache-2.0
"""Sources by name: our own, and those of other packages.

A package adds a source with an entry point in the group ``vllm_ext.sources`` that names a factory:
a callable that takes a `SourceContext` and returns a `Source`. A source is exercised on a toy
vocabulary when it is registered, so that one which breaks the contract is refused before an engine
starts, and not in the middle of a request.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

import numpy as np

from proposers.guard import BadSourceError, checked_answer
from proposers.source import Source, VerifiedRows

GROUP = "vllm_ext.sources"

_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_TOY_VOCAB = 32


class RegistrationError(ValueError):
    """A source cannot be registered; the message names it and the rule that it breaks."""


@dataclass(frozen=True, slots=True)
class SourceContext:
    """What a source is made for.

    Attributes:
        vocab_size: of the target.
        model: the target's folder or Hugging Face name; empty in the exercise at registration.
    """

    vocab_size: int
    model: str = ""


Factory = Callable[[SourceContext], Source]


class Registry:
    """Factories of sources by name.

    Args:
        reserved: names that cannot be registered: they are taken.
    """

    def __init__(self, reserved: Mapping[str, object] | None = None) -> None:
        self._reserved = frozenset(reserved or ())
        self._factories: dict[str, Factory] = {}

    @property
    def names(self) -> list[str]:
        """Registered names, sorted."""
        return sorted(self._factories)

    def register(self, name: str, factory: Factory) -> None:
        """Add a source, after trying it.

        Raises:
            RegistrationError: if the name is malformed or taken, or the source breaks the contract.
        """
        if not _NAME.fullmatch(name):
            raise RegistrationError(
                f"source {name!r}: a name has up to 32 of a-z, 0-9 and _, beginning with a letter"
            )
        if name in self._reserved or name in self._factories:
            raise RegistrationError(f"source {name!r}: the name is taken; choose another one")
        check_conformance(name, factory)
        self._factories[name] = factory

    def make(self, name: str, context: SourceContext) -> Source:
        """A new source.

        Raises:
            KeyError: if the name is not registered.
        """
        return self._factories[name](context)


def installed() -> dict[str, EntryPoint]:
    """Entry points of other packages by name; nothing is imported.

    Raises:
        RegistrationError: if two packages claim one name.
    """
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        if entry.name in found and found[entry.name].value != entry.value:
            raise RegistrationError(
                f"source {entry.name!r}: {found[entry.name].value} and {entry.value} both claim "
                "the name; uninstall one of the packages"
            )
        found[entry.name] = entry
    return found


def load(registry: Registry, entry: EntryPoint) -> None:
    """Import an entry point's factory and register it.

    Raises:
        RegistrationError: if it cannot be imported or breaks the contract.
    """
    try:
        factory = entry.load()
    except Exception as error:
        raise RegistrationError(
            f"source {entry.name!r}: {entry.value} cannot be imported ({error})"
        ) from error
    registry.register(entry.name, factory)


def check_conformance(name: str, factory: Factory) -> None:
    """Put a source through two requests on a toy vocabulary.

    Raises:
        RegistrationError: naming what it did wrong.
    """
    try:
        source = factory(SourceContext(_TOY_VOCAB))
        _exercise(source)
    except BadSourceError as error:
        raise RegistrationError(f"source {name!r}: {error}") from error
    except Exception as error:
        raise RegistrationError(
            f"source {name!r} breaks the contract of proposers.Source: "
            f"{type(error).__name__}: {error}"
        ) from error


def _exercise(source: Source) -> None:
    rows = VerifiedRows(
        np.array([[1, 2], [-1, 3]], np.int64),
        np.array([[3, 4], [5, 6]], np.int64),
        np.array([[0.6, 0.3], [0.9, 0.0]], np.float32),
        np.zeros(2, np.int64),
    )
    source.stop("unknown")
    for request, greedy in (("a", True), ("b", False)):
        # Tokens outside the vocabulary occur in multimodal prompts.
        source.start(request, [1, 2, _TOY_VOCAB + 5, 3, 1, 2], greedy=greedy, namespace=0)
    source.observe(rows)
    for request in ("a", "b"):
        source.extend(request, [3, 1])
        source.extend(request, [])
        states = [source.root(request)]
        for token in (2, 3, 7):
            states.append(source.advance(states[-1], token))
        for state in states:
            bucket, _ = checked_answer(source.candidates(state), _TOY_VOCAB)
            odds = source.prior(bucket, request == "a")
            if not 0.0 <= float(odds) < float("inf"):
                raise BadSourceError(f"prior() returned {odds!r}; it must be finite and >= 0")
    source.start("a", [2], greedy=True, namespace=1)
    source.stop("a")
    source.stop("b")
