# SPDX-License-Identifier: Apache-2.0
"""The speculative methods that this package adds, and how a speculative config is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from vllm_ext.method_options import (
    AdedConfig,
    CopyConfig,
    DatastoreConfig,
    DySpecConfig,
    PearlConfig,
    RasdConfig,
    SelfDraftConfig,
    SuffixConfig,
    TokenRecyclingConfig,
    TreeConfig,
)


class OptionError(ValueError):
    """A speculative option is unknown, of the wrong type or out of range."""


@dataclass(frozen=True, slots=True)
class Method:
    """A named way of drafting.

    Attributes:
        name: the value of ``method`` in the speculative config.
        summary: one line.
        paper: title and arXiv id of what it implements.
        options: pydantic model of its options.
    """

    name: str
    summary: str
    paper: str
    options: type[TreeConfig]


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="dyspec",
            summary="dynamic token tree from recycled target candidates and text already seen, "
            "grown best first and sized by the measured cost of a step; needs no draft model, and "
            "mixes one in where `model` names it",
            paper="DySpec (arXiv 2410.11744), Token Recycling (arXiv 2408.08696)",
            options=DySpecConfig,
        ),
        Method(
            name="self_draft",
            summary="some of the target's own layers as the draft model of dyspec, for targets "
            "that were trained to be left early; layers of others need training, by `vllm-ext "
            "distill`",
            paper="LayerSkip (arXiv 2404.16710), Draft & Verify (arXiv 2309.08168)",
            options=SelfDraftConfig,
        ),
        Method(
            name="token_recycling",
            summary="the paper's static tree over the adjacency matrix of the target's top 8",
            paper="Token Recycling (arXiv 2408.08696)",
            options=TokenRecyclingConfig,
        ),
        Method(
            name="aded",
            summary="Monte-Carlo tree search over a store of token triples that adapts to the text",
            paper="ADED (arXiv 2407.12021)",
            options=AdedConfig,
        ),
        Method(
            name="pearl",
            summary="a draft model that runs beside the target on a core of its own and goes on "
            "from what is being verified, so that drafts cost no time",
            paper="PEARL (arXiv 2408.11850)",
            options=PearlConfig,
        ),
        Method(
            name="rasd",
            summary="retrieval tree from a datastore, the prompt and the answer, pruned by a draft "
            "distribution and fused with its tree",
            paper="RASD (arXiv 2503.03434)",
            options=RasdConfig,
        ),
        Method(
            # Not `suffix`: that name is vLLM's own, with its own options.
            name="suffix_tree",
            summary="continuations of earlier occurrences of the last tokens, in the request's own "
            "text and on demand in past answers",
            paper="SuffixDecoding (arXiv 2411.04975)",
            options=SuffixConfig,
        ),
        Method(
            name="copy",
            summary="the prompt from a pointer on, which finds its place again after an edit",
            paper="Aggressive decoding (arXiv 2205.10350)",
            options=CopyConfig,
        ),
        Method(
            name="datastore",
            summary="continuations of the last tokens in a corpus on disk",
            paper="REST (arXiv 2311.08252)",
            options=DatastoreConfig,
        ),
    )
}


def describe_options(method: Method) -> str:
    """Return ``name (type, default)`` of every option, comma separated."""
    fields = method.options.model_fields.items()
    return ", ".join(
        f"{name} ({'required' if field.is_required() else f'default {field.default}'})"
        for name, field in fields
    )


def parse_options(method: Method, given: dict[str, Any]) -> TreeConfig:
    """Validate the options of a speculative config.

    Args:
        method: the method that was asked for.
        given: the config without its ``method`` key.

    Raises:
        OptionError: names each bad option, what was given and what is allowed.
    """
    if "max_nodes" in given:
        if "num_speculative_tokens" in given:
            raise OptionError(
                f"speculative method '{method.name}': max_nodes and num_speculative_tokens are one "
                "option; give one of them"
            )
        given = {"num_speculative_tokens": given["max_nodes"], **given}
        del given["max_nodes"]
    try:
        return method.options.model_validate(given)
    except ValidationError as error:
        problems = [_explain(method, problem) for problem in error.errors()]
        raise OptionError(
            f"speculative method '{method.name}': {'; '.join(problems)}. "
            f"Options: {describe_options(method)}."
        ) from None


def unknown_method(given: object, theirs: Sequence[str]) -> OptionError:
    """The error for a method that neither we nor vLLM have.

    Args:
        given: whatever was named.
        theirs: the names that vLLM takes.
    """
    names = {name.lower(): name for name in (*theirs, *METHODS)}
    close = [names[found] for found in get_close_matches(str(given).lower(), names)]
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return OptionError(
        f"unknown speculative method {given!r}.{hint} Methods of vllm-ext: {', '.join(METHODS)}; "
        f"of vLLM: {', '.join(theirs)}."
    )


def _explain(method: Method, problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"option '{name}' is required"
    if problem["type"] == "extra_forbidden":
        if name == "model":
            takes = [m.name for m in METHODS.values() if "model" in m.options.model_fields]
            return (
                f"the method takes no draft model (given model={problem['input']!r}); these do: "
                f"{', '.join(takes)}"
            )
        return f"unknown option '{name}' (given {problem['input']!r})"
    return f"option '{name}' given as {problem['input']!r}: {problem['msg'].lower()}"
