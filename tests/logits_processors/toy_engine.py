# SPDX-License-Identifier: Apache-2.0
"""Engines without a model: vLLM's own batch (V1), stand-in buffers (V2), and a table of logits."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from toy_model import EOS, GRAMMAR, TINY, ToyModel
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from logits_processors import vllm_batch
from logits_processors.session import Record
from logits_processors.vllm_entry import LogitsProcessor
from proposers.tree import TokenTree
from vllm_ext.worker.runner import TreeRunnerMixin
from vllm_ext.worker.walk import walk

MODEL = ToyModel(12)
CPU = torch.device("cpu")
_OLDER: dict[str, Any] = {}
"""What vLLM 0.31 asks of a batch beside what 0.32 does."""
if "kernel_block_sizes" in inspect.signature(InputBatch.__init__).parameters:
    _OLDER["kernel_block_sizes"] = [16]


def config(**options: Any) -> Any:
    """A stand-in for ``VllmConfig``; ``options`` replace fields of its parts."""
    parts = SimpleNamespace(
        additional_config={},
        instance_id="toy",
        speculative_config=None,
        use_v2_model_runner=False,
        parallel_config=SimpleNamespace(data_parallel_index=0),
        scheduler_config=SimpleNamespace(async_scheduling=False, max_num_seqs=8),
        model_config=SimpleNamespace(
            max_model_len=64,
            logprobs_mode="raw_logprobs",
            model="toy",
            skip_tokenizer_init=False,
            logits_processors=None,
        ),
    )
    for name, value in options.items():
        holders = (parts, parts.model_config, parts.parallel_config, parts.scheduler_config)
        setattr(next(part for part in holders if hasattr(part, name)), name, value)
    return parts


def toy_tokenizer(patch: pytest.MonkeyPatch, vocabulary: Any = TINY) -> None:
    """Let the adaptors find a toy vocabulary."""
    patch.setattr(vllm_batch, "load_vocabulary", lambda _: vocabulary)
    patch.setattr(vllm_batch, "eos_ids", lambda _: vocabulary.eos_ids)


def params(name: str | None = "a", method: str = "awrs", **options: Any) -> SamplingParams:
    """A request under the grammar of ``toy_model``, or with other keys of ours."""
    extra = {"constraint_ebnf": GRAMMAR, "constraint_method": method}
    extra |= {key: options.pop(key) for key in list(options) if key.startswith("constraint_")}
    if name is not None:
        extra["constraint_id"] = name
    options = {"max_tokens": 10, "seed": 1} | options
    made = SamplingParams(extra_args={k: v for k, v in extra.items() if v is not None}, **options)
    made.update_from_generation_config({}, EOS)
    return made


PLAIN = SamplingParams(max_tokens=10)


class ToyV1:
    """vLLM's ``InputBatch`` and our walk around a processor.

    Attributes:
        texts: what was emitted, by request.
    """

    def __init__(self, vllm_config: Any = None, *, asynchronous: bool = False) -> None:
        self.processor = LogitsProcessor(vllm_config or config(), CPU, False)
        self.batch = InputBatch(
            max_num_reqs=8,
            max_model_len=64,
            max_num_batched_tokens=64,
            device=CPU,
            vocab_size=TINY.size,
            block_sizes=[16],
            max_num_blocks_per_req=[8],
            logitsprocs=LogitsProcessors([self.processor]),
            logitsprocs_need_output_token_ids=True,
            **_OLDER,
        )
        self.asynchronous = asynchronous
        self.requests: dict[str, CachedRequestState] = {}
        self.texts: dict[str, list[int]] = {}
        self.shown: torch.Tensor = torch.empty(0)

    def add(self, name: str, sampling: SamplingParams, prompt: Sequence[int] = (0, 1)) -> None:
        self.requests[name] = CachedRequestState(
            name, list(prompt), [], sampling, None, ([0],), 0, []
        )
        self.texts[name] = []

    def finish(self, *names: str) -> None:
        for name in names:
            del self.requests[name]
            self.batch.remove_request(name)

    def enter(self, scheduled: Sequence[str], moved: Collection[str] = (), swaps: Any = ()) -> None:
        """Update the batch as the runner does; ``moved`` leave and come back at once."""
        for name in list(self.batch.req_id_to_index):
            if name not in scheduled or name in moved:
                self.batch.remove_request(name)
        for name in scheduled:
            if name not in self.batch.req_id_to_index:
                state = self.requests[name]
                if self.asynchronous:
                    state.output_token_ids = list(self.texts[name])
                self.batch.add_request(state)
        self.batch.condense()
        for one, other in swaps:
            self.batch.swap_states(one, other)
        self.batch.refresh_metadata()

    def step(
        self,
        scheduled: Sequence[str] | None = None,
        discarded: Collection[str] = (),
        trees: Mapping[str, TokenTree] | None = None,
        moved: Collection[str] = (),
        swaps: Any = (),
    ) -> dict[str, list[int]]:
        """One step of the engine; returns what each request emitted."""
        self.enter(list(self.requests) if scheduled is None else scheduled, moved, swaps)
        names = list(self.batch.req_ids)
        if not names:
            return {}
        drafts = [(trees or {}).get(name, TokenTree.EMPTY) for name in names]
        rows: list[np.ndarray[Any, Any]] = []
        starts = []
        for name, tree in zip(names, drafts, strict=True):
            starts.append(len(rows))
            rows += [MODEL.logits(self.texts[name] + path) for path in paths(tree)]
        logits = torch.from_numpy(np.array(rows)).float()
        runner = SimpleNamespace(input_batch=self.batch)

        def sampler(logits: torch.Tensor, sampling_metadata: Any) -> Any:
            self.shown = self.processor.apply(logits.clone())
            return SimpleNamespace(
                sampled_token_ids=self.shown.argmax(dim=1, keepdim=True), logprobs_tensors=None
            )

        with TreeRunnerMixin._processors_walking(runner):
            walked = walk(
                sampler,
                logits,
                self.batch.sampling_metadata,
                drafts,
                starts,
                self.batch.req_output_token_ids,
                partial(TreeRunnerMixin._update_processors, runner),
            )
        emitted = {}
        for name, tokens in zip(names, walked.tokens, strict=True):
            emitted[name] = [] if name in discarded else _until_end(tokens)
            self.texts[name] += emitted[name]
            shown = [-1] * len(emitted[name]) if self.asynchronous else emitted[name]
            self.requests[name].output_token_ids.extend(shown)
        return emitted

    def run(self, *names: str, steps: int = 40) -> None:
        """Step until the named requests have ended, as the scheduler ends them."""
        for _ in range(steps):
            self.step()
            for name in set(names) & set(self.requests):
                text, sampling = self.texts[name], self.requests[name].sampling_params
                assert sampling is not None
                assert sampling.max_tokens is not None
                if text and (text[-1] == EOS or len(text) >= sampling.max_tokens):
                    self.finish(name)
            if not set(names) & set(self.requests):
                self.step()  # the engine tells of a finish in the step that follows it
                return
        raise AssertionError("the requests did not end")

    def records(self, *names: str) -> list[Record]:
        return [Record(**fields) for fields in self.processor.records(names)]

    def session(self, name: str) -> Any:
        return self.processor._rows[self.batch.req_id_to_index[name]][0]


def _until_end(tokens: Sequence[int]) -> list[int]:
    tokens = list(tokens)
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


def paths(tree: TokenTree) -> Iterator[list[int]]:
    """Yield the tokens from the root to each row of a tree, the root's (none) first."""
    yield []
    for node in range(len(tree)):
        path: list[int] = []
        at = node
        while at >= 0:
            path.insert(0, tree.tokens[at])
            at = tree.parents[at]
        yield path


class ToyV2:
    """The buffers that Model Runner V2 shares with its processors, and its slots."""

    def __init__(self, vllm_config: Any = None, slots: int = 4, length: int = 64) -> None:
        self.states = SimpleNamespace(
            all_token_ids=SimpleNamespace(gpu=torch.zeros(slots, length, dtype=torch.int32)),
            prompt_len=SimpleNamespace(np=np.zeros(slots, dtype=np.int32)),
            prefill_len=SimpleNamespace(np=np.zeros(slots, dtype=np.int32)),
            total_len=SimpleNamespace(gpu=np.zeros(slots, dtype=np.int32)),
        )
        self.processor = LogitsProcessor(vllm_config or config(), self.states)
        self.lengths = self.states.total_len.gpu

    def add(
        self, slot: int, sampling: SamplingParams, prompt: Sequence[int], output: Sequence[int] = ()
    ) -> bool:
        tokens = [*prompt, *output]
        self.states.prompt_len.np[slot], self.states.prefill_len.np[slot] = len(prompt), len(tokens)
        ours = bool(self.processor.add_request(slot, sampling))
        self.states.all_token_ids.gpu[slot, : len(tokens)] = torch.tensor(tokens)
        self.lengths[slot] = len(tokens)
        return ours

    def text(self, slot: int) -> list[int]:
        start = int(self.states.prompt_len.np[slot])
        return list(self.states.all_token_ids.gpu[slot, start : self.lengths[slot]].tolist())

    def step(
        self, drafts: Mapping[int, Sequence[int]], computed: Mapping[int, int] | None = None
    ) -> dict[int, list[int]]:
        """One step over the slots in ``drafts``; returns what each emitted.

        Args:
            drafts: tokens guessed for each slot, in batch order.
            computed: slots whose prompt is only computed so far.
        """
        slots: list[int] = []
        offsets, fed, pos, rows = [], [], [], []
        for slot, guess in drafts.items():
            length = (computed or {}).get(slot, self.lengths[slot])
            last = int(self.states.all_token_ids.gpu[slot, length - 1])
            start = int(self.states.prompt_len.np[slot])
            text = self.states.all_token_ids.gpu[slot, start:length].tolist()
            for offset, token in enumerate([last, *guess]):
                slots.append(slot)
                offsets.append(offset)
                fed.append(token)
                pos.append(length - 1 + offset)
                rows.append(MODEL.logits(text + list(guess[:offset])))
        context = SimpleNamespace(
            expanded_idx_mapping=torch.tensor(slots),
            idx_mapping_np=np.array(list(drafts)),
            expanded_local_pos=torch.tensor(offsets),
            input_ids=torch.tensor(fed),
            pos=torch.tensor(pos),
        )
        logits = self.processor.apply(torch.from_numpy(np.array(rows)).float(), context)
        self.shown = logits
        drawn = logits.argmax(dim=1).tolist()
        emitted: dict[int, list[int]] = {}
        row = 0
        for slot, guess in drafts.items():
            tokens = [drawn[row]]
            for i, token in enumerate(guess):
                if token != drawn[row + i]:
                    break
                tokens.append(drawn[row + i + 1])
            row += 1 + len(guess)
            at = self.lengths[slot]
            done = (computed or {}).get(slot, at) >= self.states.prefill_len.np[slot]
            emitted[slot] = _until_end(tokens) if done else []
            self.states.all_token_ids.gpu[slot, at : at + len(emitted[slot])] = torch.tensor(
                emitted[slot], dtype=torch.int32
            )
            self.lengths[slot] += len(emitted[slot])
        return emitted

    def run(self, slot: int) -> None:
        while not self.text(slot) or self.text(slot)[-1] != EOS:
            self.step({slot: []})

    def records(self, *names: str) -> list[Record]:
        return [Record(**fields) for fields in self.processor.records(names)]
