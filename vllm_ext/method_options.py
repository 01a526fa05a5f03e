# SPDX-License-Identifier: Apache-2.0
"""The options of each speculative method.

Each is a typed field with a default, a range and a one-line description: validation, the table of
``vllm-ext methods`` and ``docs/methods.md`` are all generated from here.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


def _nodes(default: int) -> Any:
    return Field(
        default=default,
        ge=1,
        le=127,
        description="most tree nodes per request and step; `max_nodes` is another name for it",
    )


def _batch_nodes(default: int) -> Any:
    return Field(
        default=default,
        ge=1,
        le=4096,
        description="most tree nodes per step over all requests, the likeliest first",
    )


def _depth(default: int) -> Any:
    return Field(default=default, ge=1, le=64, description="longest path of a tree, in tokens")


_MIN_PROBABILITY: Any = Field(
    default=0.02,
    ge=0.0,
    lt=1.0,
    description="nodes whose path is less likely than this are never drafted",
)
_PRIME: Any = Field(
    default="auto",
    description="bigram table of `vllm-ext prime`: auto (from the cache, if it is there), "
    "background (so too, and a server that finds none makes it while idle), off, or the path of a "
    "file",
)
_HEAD: Any = Field(
    default="auto",
    description="draft head of `vllm-ext head`: auto (from the cache, if it is there), off, or the "
    "path of a file",
)
_DATASTORE_FOLDER = (
    "folder of a datastore of `vllm-ext datastore build`; it must not be changed while it is used"
)
_DATASTORE: Any = Field(default=None, description=_DATASTORE_FOLDER)
TRIGRAMS = 2**18
_TRIGRAMS: Any = Field(
    default=TRIGRAMS,
    ge=1,
    le=2**24,
    description="how many pairs of tokens the source trigram remembers the target's candidates "
    "after, the oldest are dropped first; about 0.25 kB each, for each LoRA adapter (the last "
    "eight)",
)
_PAST_OUTPUTS: Any = Field(
    default=0,
    ge=0,
    le=65536,
    description="memory in MiB for answers to other requests to draft from; 0: none, because one "
    "user's answers would show in the speed of another's",
)


class TreeConfig(BaseModel):
    """Options that every method has."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    num_speculative_tokens: int = _nodes(24)
    max_batch_nodes: int = _batch_nodes(128)
    adaptive: bool = Field(
        default=True,
        description="size trees by the measured latency of a step; false drafts up to "
        "num_speculative_tokens nodes per request, and max_batch_nodes per step, whenever it has "
        "them",
    )
    prompt_rows: int = Field(
        default=0,
        ge=0,
        le=4096,
        description="last prompt positions whose next-token candidates are learnt at prefill "
        "(each costs one row of the output layer, once)",
    )


class DraftWeightsConfig(TreeConfig):
    """How a draft model is loaded, whichever it is; names are vLLM's where it has them."""

    quantization: str | None = Field(
        default=None, description="of the draft model's weights, by vLLM's name; its config's"
    )
    max_model_len: int | None = Field(
        default=None,
        ge=1,
        description="longest text, in tokens, that the draft model reads; its config's, at most "
        "the target's",
    )
    draft_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="dtype of the draft model; the target's"
    )
    draft_vocab: str | None = Field(
        default=None,
        min_length=1,
        description="file of the tokens that the draft model may draft, its output layer being cut "
        "to them; the one that `vllm-ext distill` leaves in its folder, if there is one; off: all "
        "tokens",
    )
    draft_tensor_parallel_size: int = Field(
        default=1, ge=1, le=1, description="the draft model runs on one worker"
    )


class DraftModelConfig(DraftWeightsConfig):
    """Options of methods that a draft model may serve."""

    model: str | None = Field(
        default=None,
        min_length=1,
        description="draft model with the target's tokenizer, a folder or a name in the Hugging "
        "Face cache; it is mixed with the sources, and run in steps where it pays",
    )


class MixtureConfig(DraftWeightsConfig):
    """Options of a best-first tree from a mixture of sources, a draft model among them or not."""

    max_depth: int = _depth(24)
    min_probability: float = _MIN_PROBABILITY
    sources: list[str] = Field(
        default=["suffix", "trigram", "bigram"],
        description="what is mixed: suffix, copy, trigram, bigram, store, jacobi, or sources of "
        "other packages by name; `datastore`, `past_outputs_mib` and a draft model add theirs",
    )
    verify: Literal["match", "swor", "kseq", "block"] = Field(
        default="match",
        description="how drafts of sampled requests are verified: match (named drafts against the "
        "Sampler's own draw, token by token as without speculation), or a rule that keeps more of "
        "drafts drawn from a draft model and keeps the law: swor, kseq, block",
    )
    draw: Literal["beam", "constant", "sequoia", "dyspec"] = Field(
        default="beam",
        description="how trees are drawn for verify swor: beam (RSD-S, as many nodes on each "
        "level), constant (RSD-C, branches at the root), sequoia (the best shape for the "
        "acceptance measured by rank), dyspec (draws worth a threshold)",
    )
    prime: str = _PRIME
    head: str = _HEAD
    trigrams: int = _TRIGRAMS
    datastore: str | None = _DATASTORE
    past_outputs_mib: int = _PAST_OUTPUTS

    @field_validator("draw")
    @classmethod
    def _drawn_for_swor(cls, value: str, info: ValidationInfo) -> str:
        if value != "beam" and info.data.get("verify", "swor") != "swor":
            raise ValueError('it is for "verify": "swor"')
        return value


class DySpecConfig(MixtureConfig, DraftModelConfig):
    """Options of ``{"method": "dyspec"}``."""


class SelfDraftConfig(MixtureConfig):
    """Options of ``{"method": "self_draft"}``."""

    layers: int | list[int] = Field(
        description="layers of the target that draft: how many of the first (early exit), or their "
        "numbers from 0 (layer skipping)",
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _whole_numbers(cls, value: Any) -> Any:
        numbers = value if isinstance(value, list) else [value]
        if not all(type(number) is int for number in numbers):  # a bool is no number here
            raise ValueError("give a whole number, or a list of them")
        return value


class TokenRecyclingConfig(TreeConfig):
    """Options of ``{"method": "token_recycling"}``."""

    num_speculative_tokens: int = _nodes(80)
    max_batch_nodes: int = _batch_nodes(1024)
    template: Literal["paper", "dynamic"] = Field(
        default="paper", description="the paper's static tree of 80 nodes, or best-first growth"
    )
    decay: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="weight of a fresh row against the stored one; 1 overwrites, as in the paper",
    )
    prime: str = _PRIME


class AdedConfig(TreeConfig):
    """Options of ``{"method": "aded"}``."""

    max_depth: int = _depth(4)
    min_probability: float = _MIN_PROBABILITY
    iterations: int = Field(
        default=64,
        ge=1,
        le=1000,
        description="descents of the search per request and step (the paper: 150); drafting time "
        "is proportional to it",
    )
    branching: int = Field(default=12, ge=1, le=32, description="successors per expansion")
    datastore: str | None = _DATASTORE


class PearlConfig(DraftModelConfig):
    """Options of ``{"method": "pearl"}``."""

    model: str = Field(
        min_length=1,
        description="draft model with the target's tokenizer, a folder or a name in the Hugging "
        "Face cache; it runs beside the target: on a core of its own, or on a stream of its own "
        "on a GPU",
    )
    max_depth: int = _depth(16)
    min_probability: float = _MIN_PROBABILITY
    sources: list[str] = Field(
        default=[],
        description="what is mixed with the model, by name as in dyspec's `sources`; the paper: "
        "nothing",
    )
    prime: str = _PRIME
    trigrams: int = _TRIGRAMS


class RasdConfig(DraftModelConfig):
    """Options of ``{"method": "rasd"}``."""

    max_depth: int = _depth(12)
    min_probability: float = _MIN_PROBABILITY
    draft: list[str] = Field(
        default=["trigram", "bigram"],
        min_length=1,
        description="sources of the draft tree, by name as in dyspec's `sources`",
    )
    top_k: int = Field(
        default=8,
        ge=1,
        le=64,
        description="retrieved continuations must begin with one of the draft's k likeliest tokens",
    )
    prime: str = _PRIME
    trigrams: int = _TRIGRAMS
    datastore: str | None = _DATASTORE
    past_outputs_mib: int = _PAST_OUTPUTS


class SuffixConfig(TreeConfig):
    """Options of ``{"method": "suffix_tree"}``."""

    max_depth: int = _depth(24)
    min_probability: float = _MIN_PROBABILITY
    past_outputs_mib: int = _PAST_OUTPUTS


class CopyConfig(TreeConfig):
    """Options of ``{"method": "copy"}``."""

    max_depth: int = _depth(24)
    min_probability: float = _MIN_PROBABILITY


class DatastoreConfig(TreeConfig):
    """Options of ``{"method": "datastore"}``."""

    max_depth: int = _depth(16)
    min_probability: float = _MIN_PROBABILITY
    datastore: str = Field(description=_DATASTORE_FOLDER)
