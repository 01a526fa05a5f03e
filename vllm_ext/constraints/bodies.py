# SPDX-License-Identifier: Apache-2.0
"""Finding our keys in the bodies of requests, whatever the route.

vLLM's routes take extra arguments under ``vllm_xargs``; the one for tokens takes whole sampling
parameters, with ``extra_args`` among them. The bodies of all other requests are left alone, and
multipart forms are not even read: uploads are large, and what they ask for is checked in the engine
client, as everything is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from logits_processors.request import PREFIXES, is_ours

_CONSTRAINT = PREFIXES[0]
# JSON may spell a key in escapes; honest clients do not escape printable ASCII.
_MAYBE_OURS = re.compile(("|".join([*PREFIXES, r"\\u00[2-7]"])).encode())


@dataclass(frozen=True)
class Asked:
    """A request that uses one of our processors.

    Attributes:
        request: its body.
        sampling: the part of it that holds sampling parameters.
        arguments: the extra arguments there.
    """

    request: dict[str, Any]
    sampling: dict[str, Any]
    arguments: dict[str, Any]

    @property
    def constrained(self) -> bool:
        """Whether it asks for a constraint, which leaves a record."""
        return any(key.startswith(_CONSTRAINT) for key in self.arguments)

    @property
    def params(self) -> SimpleNamespace:
        """What our checks read of sampling parameters, as far as the body says it."""
        given = {name: value for name, value in self.sampling.items() if value is not None}
        if not isinstance(given.setdefault("n", 1), int):
            given["n"] = 1  # not a number: vLLM's business
        given.setdefault("temperature", None)
        return SimpleNamespace(**{**given, "extra_args": self.arguments})


def may_be_ours(scope: Any) -> bool:
    """Tell from a connection's head whether its body is to be read."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    kinds = [value for name, value in scope["headers"] if name == b"content-type"]
    return not any(kind.lower().startswith(b"multipart/") for kind in kinds)


def find(body: bytes) -> Asked | None:
    """Return what ``body`` asks of us, ``None`` if nothing or if vLLM will not understand it."""
    if not _MAYBE_OURS.search(body):
        return None
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None
    for sampling, arguments in _places(request):
        named = isinstance(arguments.get("constraint_id", ""), str)
        if named and any(is_ours(key) for key in arguments):
            return Asked(request, sampling, arguments)
    return None


def _places(request: Any) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
    if not isinstance(request, dict):
        return
    for sampling, key in ((request.get("sampling_params"), "extra_args"), (request, "vllm_xargs")):
        if isinstance(sampling, dict) and isinstance(sampling.get(key), dict):
            yield sampling, sampling[key]
