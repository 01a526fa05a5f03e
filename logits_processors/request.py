# SPDX-License-Identifier: Apache-2.0
"""What a request may ask for: flat keys, the same offline (``extra_args``) and over HTTP.

vLLM's ``vllm_xargs`` carries strings, numbers and lists only, so a constraint travels as a string
under a key of its own. Parsing, the error messages and the table in the documentation all come from
the models below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .awrs import Estimator
from .compilation import Kind, Spec
from .constraint import ConstraintError
from .messages import named, shown

SamplerName: TypeAlias = Literal["awrs", "masking", "asap", "cars"]

_MOST_PROBLEMS = 8
"""How many a message tells of: it must not grow with the request."""

_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)


class RequestError(ConstraintError):
    """A request's keys were refused.

    Attributes:
        key: one to change, if several are wrong.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = named(key)


class ConstraintRequest(BaseModel):
    """A constrained text. Exactly one of the first eight keys says what the constraint is."""

    model_config = _STRICT

    constraint_json_schema: str | None = Field(
        default=None, description="JSON schema, compiled to token masks"
    )
    constraint_json_validate: str | None = Field(
        default=None,
        description="JSON schema, checked by a validator: all keywords, judged when the text ends",
    )
    constraint_ebnf: str | None = Field(
        default=None, description="grammar in xgrammar's EBNF (GBNF), start rule `root`"
    )
    constraint_lark: str | None = Field(
        default=None, description="grammar in llguidance's Lark dialect, start rule `start`"
    )
    constraint_regex: str | None = Field(
        default=None, description="regular expression for the whole text, compiled to token masks"
    )
    constraint_regex_partial: str | None = Field(
        default=None,
        description="regular expression of the `regex` package: look-around, back-references",
    )
    constraint_structural_tag: str | None = Field(
        default=None, description="structural tag (JSON): free text with constrained parts"
    )
    constraint_predicate: str | None = Field(
        default=None, description="name of an installed predicate (`vllm_ext.predicates`)"
    )
    constraint_argument: str = Field(default="", description="text for the predicate")
    constraint_method: SamplerName = Field(
        default="awrs",
        description="`awrs` (few checks, weights), `masking` (as structured outputs), `asap` "
        "(learns, exact in the limit), `cars` (exact, restarts)",
    )
    constraint_estimator: Estimator = Field(
        default="recursive", description="which estimator of the weight AWRS uses"
    )
    constraint_max_rejects: int = Field(
        default=64, ge=1, le=100_000, description="AWRS: refusals in a step before the full mask"
    )
    constraint_max_accepts: int = Field(
        default=2, ge=2, le=1000, description="AWRS with `geometric`: accepts to wait for"
    )
    constraint_seed: int | None = Field(
        default=None,
        ge=-(2**63),
        lt=2**64,
        description="noise of this request; default: its `seed`, else fresh",
    )
    constraint_id: str | None = Field(
        default=None, min_length=1, max_length=128, description="name to ask for the results under"
    )
    constraint_prefix: int = Field(
        default=0,
        ge=0,
        description="how many tokens at the end of the prompt already belong to the text (SMC)",
    )

    @property
    def spec(self) -> Spec:
        """The constraint itself."""
        kind, source = next(
            (kind, source)
            for kind in get_args(Kind)
            if (source := getattr(self, f"constraint_{kind}")) is not None
        )
        return Spec(kind, source, self.constraint_argument)


class MirostatRequest(BaseModel):
    """A text whose surprise is held at a target (arXiv 2007.14966)."""

    model_config = _STRICT

    mirostat_version: Literal[1, 2] = Field(description="1 or 2; switches Mirostat on")
    mirostat_tau: float = Field(
        default=5.0, gt=0, allow_inf_nan=False, description="target surprise, in bits"
    )
    mirostat_eta: float = Field(
        default=0.1, gt=0, allow_inf_nan=False, description="learning rate of the controller"
    )


class MomentumRequest(BaseModel):
    """A greedy text that resists repeating itself (arXiv 2212.02175)."""

    model_config = _STRICT

    momentum_alpha: float = Field(
        ge=0, allow_inf_nan=False, description="strength of the resistance; switches it on"
    )
    momentum_top_k: int = Field(default=5, ge=1, description="number of candidates")


Request: TypeAlias = ConstraintRequest | MirostatRequest | MomentumRequest

_FAMILIES: dict[str, type[Request]] = {
    "constraint_": ConstraintRequest,
    "mirostat_": MirostatRequest,
    "momentum_": MomentumRequest,
}

PREFIXES = tuple(_FAMILIES)
"""What the keys of this package begin with."""


def is_ours(key: object) -> bool:
    """Tell whether a key of ``extra_args`` belongs to this package."""
    return isinstance(key, str) and key.startswith(PREFIXES)


def parse_request(extra_args: Mapping[str, Any] | None) -> Request | None:
    """Read our keys out of a request's extra arguments; ``None`` if there are none.

    Raises:
        RequestError: names the key, what was given and what is allowed.
    """
    if not extra_args:
        return None
    given: dict[str, dict[str, Any]] = {}
    for key, value in extra_args.items():
        for prefix in _FAMILIES:
            if is_ours(key) and key.startswith(prefix):
                given.setdefault(prefix, {})[key] = value
    if not given:
        return None
    if len(given) > 1:
        keys_given = sorted(key for keys in given.values() for key in keys)
        raise RequestError(
            keys_given[0],
            f"{', '.join(map(named, keys_given[:_MOST_PROBLEMS]))}: keys of "
            "different processors; a request may use one of constraint_*, mirostat_*, momentum_*",
        )
    prefix, keys = given.popitem()
    for key, value in keys.items():
        for text in (key, value):
            if isinstance(text, str) and not _encodes(text):
                raise RequestError(
                    ascii(key)[1:-1],  # a key that cannot be encoded cannot be answered with either
                    f"{named(key)!a} holds half of a surrogate pair, which is no Unicode text",
                )
    try:
        request = _FAMILIES[prefix].model_validate(keys)
    except ValidationError as error:
        problems = error.errors()
        explained = "; ".join(_explain(_FAMILIES[prefix], p) for p in problems[:_MOST_PROBLEMS])
        raise RequestError(str(problems[0]["loc"][0]), explained) from None
    if isinstance(request, ConstraintRequest):
        _require_one_constraint(request)
    return request


def _require_one_constraint(request: ConstraintRequest) -> None:
    keys = [f"constraint_{kind}" for kind in get_args(Kind)]
    stated = [key for key in keys if getattr(request, key) is not None]
    if len(stated) != 1:
        raise RequestError(
            stated[-1] if stated else "constraint_*",
            f"{' and '.join(stated) or 'no constraint'} given; "
            f"give exactly one of {', '.join(keys)}",
        )
    if request.constraint_argument and request.constraint_predicate is None:
        raise RequestError(
            "constraint_argument",
            f"constraint_argument given with {stated[0]}; only constraint_predicate takes one",
        )
    if request.constraint_prefix and request.constraint_method in ("asap", "cars"):
        raise RequestError(
            "constraint_prefix",
            f"constraint_prefix given with constraint_method {request.constraint_method!r}, whose "
            "texts begin at the first token; allowed with awrs and masking",
        )


def _explain(model: type[Request], problem: Any) -> str:
    name = named(".".join(str(part) for part in problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"{name}: unknown key; known are {', '.join(model.model_fields)}"
    if problem["type"] == "missing":
        return f"{name} is missing; it switches the processor on"
    return f"{name} given as {shown(problem['input'])}: {problem['msg'].lower()}"


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def table() -> Iterator[tuple[str, str, str, str]]:
    """Yield ``(key, type, default, description)`` of every request key, for the documentation."""
    for model in _FAMILIES.values():
        for key, field in model.model_fields.items():
            annotation = field.annotation
            if get_args(annotation) and type(None) in get_args(annotation):
                annotation = next(a for a in get_args(annotation) if a is not type(None))
            values = get_args(annotation)
            kind = " / ".join(map(str, values)) if values else getattr(annotation, "__name__", "")
            default = field.get_default()
            shown = "required" if field.is_required() else str(default) if default else "-"
            yield key, kind, shown, field.description or ""
