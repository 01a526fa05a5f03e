# SPDX-License-Identifier: Apache-2.0
"""A second model in the worker, on vLLM's own paged KV cache.

vLLM gives keys and values to every attention layer that is built under its compilation config. A
draft model loaded with a prefix of its own therefore gets its share of every block and the target's
block tables with it: slot p of a request is slot p of both models. The forward pass here is vLLM's,
with attention metadata from vLLM's builders.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.compilation.backends import set_model_tag
from vllm.config.utils import replace
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, UniformTypeKVCacheSpecs

from proposers.tree import TokenTree
from vllm_ext.draft_config import check_memory, draft_model_config, draft_vocab
from vllm_ext.identity import local_folder
from vllm_ext.methods import OptionError
from vllm_ext.worker.beside import (
    lay_out,
    own_context,
    reentrant_layers,
    why_not_one_code,
    why_not_reentrant,
)
from vllm_ext.worker.beside_stream import why_not_on_stream
from vllm_ext.worker.narrow_head import Logits, NarrowError, narrow
from vllm_ext.worker.observe import top_candidates
from vllm_ext.worker.shared_weights import share_equal_weights
from vllm_ext.worker.step import STEP_ATTRIBUTE, AttentionStep, Step, TreeRows
from vllm_ext.worker.trace import Trace

logger = init_logger("vllm.vllm_ext")

PREFIX = "draft_model"
_ROUNDS = 3
_REHEARSED = 4  # rows


@dataclass(slots=True)
class DraftRows:
    """Consecutive rows of one request in a pass of the draft model.

    Attributes:
        row: of the request in vLLM's batch.
        start: slot of the first row within the request; the others follow.
        tokens: of the rows.
        wanted: how many of the last rows are asked what follows.
        tree: of rows ``[start - first, ...)``, the rows before ``start`` being in the cache; or
            ``None`` if every row sees all before it.
        first: rows of the tree that are in the cache already.
    """

    row: int
    start: int
    tokens: Sequence[int]
    wanted: int
    tree: TokenTree | None = None
    first: int = 0


class DraftModel:
    """The loaded model.

    Args:
        runner: the model runner, whose target is loaded.
        options: of the method.
        beside: whether passes may run beside the target's: in another thread, on a GPU by a
            stream of their own.

    Raises:
        OptionError: the weights do not fit, or vLLM cannot load them.

    Attributes:
        layers: names of its attention layers.
        vocab_size: tokens that it reads.
        drafted_vocab: tokens that it drafts.
        max_model_len: longest text that it can read.
        shared_bytes: of its weights, those that lie in the target's memory.
        seconds: spent in passes so far, but for those beside the target's.
        failed: whether a pass has raised an error.
        trace: gets a span for each pass.
    """

    def __init__(self, runner: Any, options: Any, *, beside: bool = False) -> None:
        target: Any = runner.vllm_config
        self._runner = runner
        self._on_cpu = runner.device.type == "cpu"
        beside = beside and self._on_cpu  # elsewhere the layers are the same
        config = draft_model_config(options, target.model_config)
        folder = local_folder(options.model, None, target.load_config.download_dir)
        check_memory(folder, _free_memory(runner.device))
        self._config = replace(
            target,
            model_config=config,
            # A copy: building the config writes into it what kind of model this is.
            parallel_config=replace(target.parallel_config, rank=target.parallel_config.rank),
            quant_config=None,
            lora_config=None,
        )
        context = target.compilation_config.static_forward_context
        before = set(context)
        with set_model_tag(PREFIX), reentrant_layers() if beside else nullcontext():
            self._model = get_model(vllm_config=self._config, prefix=PREFIX)
            self.shared_bytes = share_equal_weights(self._model, runner.get_model())
            prepare = lay_out if beside else lambda layer: None
            prepare(self._model)
            tokens = draft_vocab(options, config, folder)
            self._vocab, self._logits = self._output(tokens, prepare)
        logger.info(
            "vllm-ext: %.1f MiB of the draft model are the target's", self.shared_bytes / 2**20
        )
        self.layers = sorted(set(context) - before)
        self.vocab_size = int(config.get_vocab_size())
        self.drafted_vocab = self.vocab_size if self._vocab is None else len(self._vocab)
        self.max_model_len = int(config.max_model_len)
        self.seconds = 0.0
        self.failed = False
        self.trace = Trace(None)

    def _output(
        self, tokens: Sequence[int] | None, prepare: Callable[[torch.nn.Module], None]
    ) -> tuple[NDArray[np.int64] | None, Logits]:
        """The ids that it drafts (``None``: all) and how their logits are computed."""
        config = self._config.model_config
        if tokens is not None:
            try:
                ids = torch.tensor(tokens, device=self._runner.device)
                width = config.get_hidden_size()
                logits = narrow(self._model, ids, width, config.dtype, prepare)
                return np.array(tokens, np.int64), logits
            except NarrowError as error:
                logger.warning("vllm-ext: the draft model drafts of all tokens: %s", error)
        return None, self._model.compute_logits

    def bind(self) -> None:
        """Find its part of the KV cache, once that is allocated.

        Raises:
            OptionError: its layers cannot share the target's blocks.
        """
        runner = self._runner
        context = runner.compilation_config.static_forward_context
        groups = [
            (gid, group)
            for gid, group in enumerate(runner.kv_cache_config.kv_cache_groups)
            if set(self.layers) & set(group.layer_names)
        ]
        if len(groups) != 1 or set(self.layers) - set(groups[0][1].layer_names):
            raise OptionError(
                f"draft model: its {len(self.layers)} attention layers fall into {len(groups)} KV "
                "cache groups, one is needed: give a draft model whose layers all attend to the "
                "whole context"
            )
        gid, group = groups[0]
        specs = dict.fromkeys(self.layers, group.kv_cache_spec)
        if isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs):
            specs = {name: group.kv_cache_spec.kv_cache_specs[name] for name in self.layers}
        kinds = {type(spec).__name__ for spec in specs.values()}
        if not all(isinstance(spec, FullAttentionSpec) for spec in specs.values()):
            raise OptionError(
                f"draft model: its layers keep {', '.join(sorted(kinds))}, FullAttentionSpec is "
                "needed: give a draft model whose layers all attend to the whole context"
            )
        self.table = runner.input_batch.block_table[gid]
        # Builders of its own: in those of the runner its layers may be mixed with the target's,
        # whose heads or dtype differ.
        kinds_of: dict[tuple[Any, Any], list[str]] = {}
        for name in self.layers:
            kinds_of.setdefault((context[name].get_attn_backend(), specs[name]), []).append(name)
        self._builders = [
            (backend.get_builder_cls()(spec, names, self._config, runner.device), names)
            for (backend, spec), names in kinds_of.items()
        ]

    @torch.inference_mode()
    def measure(self, row_counts: Sequence[int]) -> list[tuple[int, float]]:
        """Seconds of a pass over dummy tokens, by row count; the best of several rounds."""
        runner = self._runner
        counts = [rows for rows in row_counts if rows <= runner.max_num_tokens]
        best = dict.fromkeys(counts, float("inf"))
        for _ in range(_ROUNDS):
            # Where the model is compiled its first pass is traced, and vLLM drops the guards that
            # would notice a difference later. So the largest first, for a single row would be taken
            # for a constant, and two tensors, for one would be taken for the other.
            for rows in sorted(counts, reverse=True):
                begin = time.perf_counter()
                tokens = torch.zeros(rows, dtype=torch.int64, device=runner.device)
                self._top(self._hidden(tokens, torch.zeros_like(tokens), None, None), 1)
                best[rows] = min(best[rows], time.perf_counter() - begin)
        return list(best.items())

    @torch.inference_mode()
    def rehearse(self) -> None:
        """A pass over dummy tokens, as beside the target: what a first one compiles or allocates in
        its thread or stream is not to be taken for its price.
        """
        tokens = torch.zeros(_REHEARSED, dtype=torch.int64, device=self._runner.device)
        with own_context(self._config, None, {}):
            self._top(self._forward(tokens, torch.zeros_like(tokens)), 1)

    def why_not_beside(self) -> str | None:
        """Why its passes cannot run beside the target's, or ``None`` if they can."""
        why_not = why_not_reentrant if self._on_cpu else why_not_on_stream
        target = self._runner.get_model()
        return why_not(self._model) or why_not_one_code(self._model, target)

    @torch.inference_mode()
    def run(
        self, parts: Sequence[DraftRows], width: int, *, beside: bool = False
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """One pass.

        Args:
            parts: at most one per request, and not more rows than a step of the engine may have.
            width: candidates per wanted row.
            beside: whether the target may be running.

        Returns:
            ids int64 [wanted, width] and probabilities float32 [wanted, width], in the order of
            the parts.
        """
        begin = time.perf_counter()
        self.failed = True  # until it has not
        device = self._runner.device
        starts = np.zeros(len(parts) + 1, np.int32)
        starts[1:] = np.cumsum([len(part.tokens) for part in parts])
        tokens = np.concatenate([np.asarray(part.tokens, np.int64) for part in parts])
        by_trees = beside and self._on_cpu
        step = _step(parts, starts, always=by_trees)
        positions, slots = self._places(parts, step)
        mapping = dict.fromkeys(self.layers, torch.from_numpy(slots).to(device))
        inputs = torch.from_numpy(tokens).to(device), torch.from_numpy(positions).to(device)
        if by_trees:
            assert step is not None
            metadata = self._tree_metadata(parts, step)
        else:
            metadata = self._metadata(parts, starts, positions, slots, step)
        if beside:
            with own_context(self._config, metadata, mapping):
                hidden = self._forward(*inputs)
        else:
            hidden = self._hidden(*inputs, metadata, mapping)
        wanted = [
            np.arange(end - part.wanted, end) for part, end in zip(parts, starts[1:], strict=True)
        ]
        rows = torch.from_numpy(np.concatenate(wanted)).to(device)
        found = self._top(hidden[rows], width) if len(rows) else _NOTHING
        end = time.perf_counter()
        if not beside:
            self.seconds += end - begin
        self.trace.span("draft", begin, end, rows=len(tokens))
        self.failed = False
        return found

    def _places(
        self, parts: Sequence[DraftRows], step: Step | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Positions and slots of the rows, int64 [rows] each."""
        size = self.table.block_size
        blocks = self.table.get_numpy_array()
        ranges = [np.arange(part.start, part.start + len(part.tokens)) for part in parts]
        slots = [
            blocks[part.row, at // size].astype(np.int64) * size + at % size
            for part, at in zip(parts, ranges, strict=True)
        ]
        if step is not None and step.attention is not None:
            for tree in step.attention.trees:
                ranges[tree.request] = tree.base + tree.depths[tree.first :]
        return np.concatenate(ranges), np.concatenate(slots)

    def _metadata(
        self,
        parts: Sequence[DraftRows],
        starts: NDArray[np.int32],
        positions: NDArray[np.int64],
        slots: NDArray[np.int64],
        step: Step | None,
    ) -> dict[str, Any]:
        """Attention metadata by layer, from vLLM's builders."""
        device = self._runner.device
        lengths = np.array([part.start + len(part.tokens) for part in parts], np.int32)
        starts_cpu, lengths_cpu = torch.from_numpy(starts), torch.from_numpy(lengths)
        rows = torch.tensor([part.row for part in parts], device=device)
        table = self.table.get_device_tensor(self._runner.input_batch.num_reqs)[rows]
        common = CommonAttentionMetadata(
            query_start_loc=starts_cpu.to(device),
            query_start_loc_cpu=starts_cpu,
            seq_lens=lengths_cpu.to(device),
            num_reqs=len(parts),
            num_actual_tokens=int(starts[-1]),
            max_query_len=int(np.diff(starts).max()),
            max_seq_len=int(lengths.max()),
            block_table_tensor=table,
            slot_mapping=torch.from_numpy(slots).to(device),
            causal=True,
            positions=torch.from_numpy(positions).to(device),
            is_prefilling=torch.zeros(len(parts), dtype=torch.bool),
            seq_lens_cpu_upper_bound=lengths_cpu,
        )
        built: dict[str, Any] = {}
        for builder, names in self._builders:
            metadata = builder.build(0, common)
            if step is not None:
                bases = np.array([part.start - part.first for part in parts], np.int32)
                self._runner.attach_trees(metadata, step, starts, bases, table)
            built.update(dict.fromkeys(names, metadata))
        return built

    def _tree_metadata(self, parts: Sequence[DraftRows], step: Step) -> dict[str, Any]:
        """Attention metadata by layer for rows that tree attention takes, all of them.

        vLLM's builder would resize buffers that the target is using.
        """
        rows = [part.row for part in parts]
        table = torch.from_numpy(self.table.get_numpy_array()[rows])
        metadata = SimpleNamespace(block_table=table, **{STEP_ATTRIBUTE: step.attention})
        return dict.fromkeys(self.layers, metadata)

    def _hidden(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        metadata: dict[str, Any] | None,
        slots: dict[str, torch.Tensor] | None,
    ) -> torch.Tensor:
        with set_forward_context(
            metadata, self._config, num_tokens=len(tokens), slot_mapping=slots
        ):
            return self._forward(tokens, positions)

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden = self._model(input_ids=tokens, positions=positions)
        return hidden if isinstance(hidden, torch.Tensor) else hidden[0]

    def _top(
        self, hidden: torch.Tensor, width: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        logits = self._logits(hidden)
        # The output layer may be padded beyond the target's vocabulary.
        vocab = min(logits.shape[1], self._runner.model_config.get_vocab_size())
        found, probs = top_candidates(logits[:, :vocab], min(width, vocab))
        ids = found.cpu().numpy()
        return ids if self._vocab is None else self._vocab[ids], probs.cpu().numpy()


_NOTHING = np.empty((0, 0), np.int64), np.empty((0, 0), np.float32)


def _step(
    parts: Sequence[DraftRows], starts: NDArray[np.int32], *, always: bool = False
) -> Step | None:
    """The trees of a pass, or ``None`` if the stock kernel can do it all.

    Args:
        parts: of the pass.
        starts: first row of each.
        always: let tree attention take rows without a tree too.
    """
    if not always and all(part.tree is None for part in parts):
        return None
    chains = [TokenTree.chain(part.tokens[1:], [0.0] * (len(part.tokens) - 1)) for part in parts]
    branching = []
    for index, part in enumerate(parts):
        if part.tree is not None or always:
            base = part.start - part.first
            tree = TreeRows.build(index, int(starts[index]), base, part.tree or chains[index])
            tree.first = part.first
            branching.append(tree)
    rows = np.concatenate([np.arange(t.start, t.start + t.queries) for t in branching])
    attention = AttentionStep(
        branching, torch.from_numpy(rows), len(rows) == int(starts[-1]), keep=False
    )
    trees = [part.tree or chain for part, chain in zip(parts, chains, strict=True)]
    return Step(trees, starts[:-1].tolist(), attention, 0)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
