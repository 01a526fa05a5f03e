# SPDX-License-Identifier: Apache-2.0
"""From a method's options to its drafter: which sources, which grower, which files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proposers.copying import CopySource
from proposers.cost_model import CostModel
from proposers.datastore import Datastore
from proposers.drafter import TreeDrafter
from proposers.dyspec import DySpec, DySpecOptions
from proposers.gate import Gate
from proposers.grower import Grower
from proposers.guard import GuardedSource
from proposers.hydra import HydraHead
from proposers.hydra_source import HydraSource
from proposers.jacobi import JacobiSource
from proposers.layerwise import Layerwise
from proposers.levels import LevelPredictor
from proposers.mixture import Mixture
from proposers.past import PastSource
from proposers.prime import PrimeTable
from proposers.puct import Puct
from proposers.rasd import Rasd
from proposers.recycling import NEGLIGIBLE, BigramRecycling, TrigramRecycling
from proposers.registry import Registry, SourceContext, installed, load
from proposers.retrieval import DatastoreSource
from proposers.source import Source
from proposers.suffix import SuffixSource
from proposers.template import StaticTemplate
from proposers.trigram_store import TrigramStore
from vllm_ext.head import HEADS
from vllm_ext.identity import local_folder, tokenizer_hash
from vllm_ext.method_options import (
    TRIGRAMS,
    AdedConfig,
    DySpecConfig,
    PearlConfig,
    RasdConfig,
    TokenRecyclingConfig,
    TreeConfig,
)
from vllm_ext.methods import OptionError
from vllm_ext.model_files import OFF
from vllm_ext.prime import TABLES


@dataclass(frozen=True, slots=True)
class Resources:
    """What a drafter needs besides its options; loaded once per engine.

    Attributes:
        vocab_size: of the target.
        model: the target's folder or name.
        prime: the primed bigrams, if there are any.
        head: the draft head, if there is one.
        datastore: the opened datastore, if one is configured.
        trigrams: contexts that the source of that name remembers.
        plugins: sources of other packages that the options name.
        failed: names of the sources that are disabled, see `proposers.guard`.
    """

    vocab_size: int
    model: str = ""
    prime: PrimeTable | None = None
    head: HydraHead | None = None
    datastore: Datastore | None = None
    trigrams: int = TRIGRAMS
    plugins: Registry = field(default_factory=lambda: Registry(BUILT_IN))
    failed: set[str] = field(default_factory=set)


BUILT_IN: dict[str, Callable[[Resources], Source]] = {
    "suffix": lambda r: SuffixSource(r.vocab_size),
    "copy": lambda r: CopySource(r.vocab_size),
    "trigram": lambda r: TrigramRecycling(r.trigrams),
    "bigram": lambda r: BigramRecycling(r.vocab_size, prime=r.prime),
    "store": lambda r: TrigramStore(r.vocab_size),
    "jacobi": lambda r: JacobiSource(),
}
"""Sources that need no file, by the name that options give them."""


def check_resources(options: TreeConfig, model_config: Any, download_dir: str | None) -> None:
    """Refuse files and sources that the user named and that cannot be used.

    Raises:
        ValueError: saying which and why, before any engine process starts.
    """
    plugin_registry(_names(options))
    _datastore(options, model_config, download_dir)
    TABLES.check(getattr(options, "prime", OFF), model_config, download_dir)
    HEADS.check(getattr(options, "head", OFF), model_config, download_dir)


def load_resources(options: TreeConfig, model_config: Any, download_dir: str | None) -> Resources:
    """Everything the options name, opened in the process that drafts.

    Raises:
        ValueError: as `check_resources`; a file may have changed in between.
    """
    return Resources(
        vocab_size=model_config.get_vocab_size(),
        model=model_config.model,
        prime=TABLES.for_engine(getattr(options, "prime", OFF), model_config, download_dir),
        head=HEADS.for_engine(getattr(options, "head", OFF), model_config, download_dir),
        datastore=_datastore(options, model_config, download_dir),
        trigrams=getattr(options, "trigrams", TRIGRAMS),
        plugins=plugin_registry(_names(options)),
    )


def plugin_registry(names: Iterable[str]) -> Registry:
    """The sources of other packages among `names`, registered.

    Raises:
        OptionError: if nobody provides a name.
        RegistrationError: if a source breaks the contract, or two packages claim one name.
    """
    registry = Registry(BUILT_IN)
    wanted = [name for name in dict.fromkeys(names) if name not in BUILT_IN]
    if wanted:
        others = installed()
        for name in wanted:
            if name not in others:
                raise OptionError(
                    f"unknown source {name!r}; there are {', '.join([*BUILT_IN, *others])}"
                )
            load(registry, others[name])
    return registry


def build_drafter(
    method: str,
    options: TreeConfig,
    resources: Resources,
    cost: CostModel,
    predictor: LevelPredictor | None = None,
) -> TreeDrafter:
    """The drafter of a method.

    Args:
        method: its name.
        options: its validated options.
        resources: what `load_resources` gave for them.
        cost: latency of a step by rows.
        predictor: the draft model, if the options name one and it works.
    """
    limits = DySpecOptions(
        max_nodes=options.num_speculative_tokens,
        max_batch_nodes=options.max_batch_nodes,
        max_depth=getattr(options, "max_depth", 64),
        min_prob=max(getattr(options, "min_probability", 0.0), 1e-6),
    )
    return TreeDrafter(
        resources.vocab_size,
        limits,
        cost,
        grower=_grower(method, options, resources, limits, predictor),
        gate=Gate() if options.adaptive else None,
    )


def _grower(
    method: str,
    options: TreeConfig,
    resources: Resources,
    limits: DySpecOptions,
    predictor: LevelPredictor | None,
) -> Grower:
    files = _file_sources(options, resources)
    if isinstance(options, TokenRecyclingConfig):
        static = options.template == "paper"
        bigrams = BigramRecycling(
            resources.vocab_size,
            decay=options.decay,
            prime=resources.prime,
            # The static tree has a place for every rank, however unlikely.
            negligible=0.0 if static else NEGLIGIBLE,
        )
        table = _fenced("bigram", bigrams, resources)
        if static:
            return StaticTemplate(table, max_batch_nodes=options.max_batch_nodes)
        return DySpec(Mixture([table]), limits)
    if isinstance(options, AdedConfig):
        mixture = Mixture([*_sources(["store"], resources), *files])
        return Puct(mixture, limits, iterations=options.iterations, branching=options.branching)
    if isinstance(options, RasdConfig):
        retrieval = Mixture([*_sources(["suffix"], resources), *files])
        sources = _sources(options.draft, resources)
        draft = (
            DySpec(Mixture(sources), limits)
            if predictor is None
            else Layerwise(predictor, sources, limits, free=not options.adaptive)
        )
        return Rasd(draft, DySpec(retrieval, limits), limits, top_k=options.top_k)
    if isinstance(options, DySpecConfig | PearlConfig):
        mixed = [*files, *_sources(options.sources, resources)]
        if predictor is not None:
            return Layerwise(predictor, mixed, limits, free=not options.adaptive)
        return DySpec(Mixture(mixed), limits)
    own = {"suffix_tree": ["suffix"], "copy": ["copy"]}.get(method, [])
    return DySpec(Mixture([*_sources(own, resources), *files]), limits)


def _names(options: TreeConfig) -> list[str]:
    return list(getattr(options, "sources", getattr(options, "draft", [])))


def _sources(names: Iterable[str], resources: Resources) -> list[Source]:
    made: list[Source] = []
    for name in dict.fromkeys(names):
        if name in BUILT_IN:
            made.append(_fenced(name, BUILT_IN[name](resources), resources))
        else:
            context = SourceContext(resources.vocab_size, resources.model)
            source = resources.plugins.make(name, context)
            made.append(GuardedSource(name, source, resources.vocab_size, resources.failed))
    return made


def _fenced(name: str, source: Source, resources: Resources) -> Source:
    return GuardedSource(name, source, None, resources.failed)


def _file_sources(options: TreeConfig, resources: Resources) -> list[Source]:
    """Sources that an option with a value of its own switches on."""
    made: list[Source] = []
    if resources.head is not None:
        made.append(_fenced("head", HydraSource(resources.head), resources))
    if resources.datastore is not None:
        store = DatastoreSource(resources.datastore, resources.vocab_size)
        made.append(_fenced("datastore", store, resources))
    mebibytes = getattr(options, "past_outputs_mib", 0)
    if mebibytes:
        past = PastSource(resources.vocab_size, max_bytes=mebibytes << 20)
        made.append(_fenced("past_outputs", past, resources))
    return made


def _datastore(
    options: TreeConfig, model_config: Any, download_dir: str | None
) -> Datastore | None:
    named = getattr(options, "datastore", None)
    if named is None:
        return None
    folder = local_folder(model_config.model, model_config.revision, download_dir)
    return Datastore(Path(named).expanduser(), tokenizer_hash(folder))
