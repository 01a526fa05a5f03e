# SPDX-License-Identifier: Apache-2.0
"""What the GPU runner adds to the stock runner, around a stock runner that does nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker import gpu_model_runner

from proposers.tree import TokenTree
from tests.vllm_ext.worker.test_device_walk import metadata
from vllm_ext.worker import gpu
from vllm_ext.worker.gpu import TreeGPURunnerMixin, agreed
from vllm_ext.worker.walk import WalkResult

pytest.importorskip("triton")

TREE = TokenTree((5, 6, 7), (-1, -1, 0), (0.5,) * 3)
CHAIN = TokenTree((5, 6), (-1, 0), (0.5,) * 2)


class Stock:
    """The parts of vLLM's runner that the overrides call."""

    graphs: Any = None

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> str:
        return "prepared"

    def _determine_batch_execution_and_padding(self, **kwargs: Any) -> None:
        self.graphs = kwargs

    def _build_attention_metadata(self, **kwargs: Any) -> Any:
        return ({name: SimpleNamespace() for name in ("a", "b", "c")}, None)


class Runner(TreeGPURunnerMixin, Stock):  # type: ignore[misc]
    def __init__(self, trees: dict[str, TokenTree]) -> None:
        sizes = [len(tree) + 1 for tree in trees.values()]
        self.device = torch.device("cpu")
        self._step = None
        self._drafting: Any = SimpleNamespace(trees=trees, listens=lambda step: True)
        self.query_start_loc = SimpleNamespace(np=np.cumsum([0, *sizes], dtype=np.int32))
        self.positions = torch.arange(sum(sizes))
        self.sampler = Sampler()
        self.attended: list[Any] = []
        self.timed: list[float] = []
        self._timer: Any = SimpleNamespace(
            attend=lambda *what: self.attended.append(what),
            work_outside=lambda seconds, sampling: self.timed.append(seconds - sampling),
        )
        tables = [
            SimpleNamespace(get_device_tensor=lambda n, g=g: torch.full((n, 1), g)) for g in (0, 1)
        ]
        self.input_batch = SimpleNamespace(
            num_reqs=len(trees),
            req_ids=list(trees),
            num_computed_tokens_cpu=np.full(len(trees), 20, dtype=np.int32),
            block_table=tables,
            sampling_metadata=metadata(len(trees)),
            req_output_token_ids=[[] for _ in trees],
            logitsprocs=SimpleNamespace(all=[]),
        )
        groups = [SimpleNamespace(layer_names=["a", "b"]), SimpleNamespace(layer_names=["c"])]
        self.kv_cache_config = SimpleNamespace(kv_cache_groups=groups)
        self.scheduled = SimpleNamespace(
            scheduled_spec_decode_tokens={r: list(t.tokens) for r, t in trees.items() if t.tokens}
        )

    def prepare(self) -> None:
        assert self._prepare_inputs(self.scheduled, None) == "prepared"


def test_a_branching_step_reaches_every_layer() -> None:
    from vllm_ext.attention.tree_launch import LAUNCH_ATTRIBUTE

    runner = Runner({"x": CHAIN, "y": TREE})
    runner.prepare()
    assert runner.positions[3:].tolist() == [20, 21, 21, 22]
    assert runner.attended == [([20, 20], [len(CHAIN), len(TREE)], 1)]
    built, _ = runner._build_attention_metadata()
    launches = {name: getattr(md, LAUNCH_ATTRIBUTE) for name, md in built.items()}
    assert launches["a"].step is launches["c"].step  # plans are shared
    assert launches["a"].block_table.tolist() == [[0], [0]]
    assert launches["c"].block_table.tolist() == [[1], [1]]
    assert len(launches["a"].step.trees) == 2
    assert launches["a"].step.everything


def test_a_branching_step_replays_no_full_graph() -> None:
    runner = Runner({"x": TREE})
    runner.prepare()
    runner._determine_batch_execution_and_padding(num_tokens=4)
    assert runner.graphs == {"num_tokens": 4, "force_uniform_decode": False}


def test_nodes_move_in_the_caches_where_that_works(monkeypatch: Any) -> None:
    runner = Runner({"x": TREE})
    runner.prepare()
    assert runner._step is not None
    attention = runner._step.attention
    assert attention is not None
    assert attention.keep  # rows are kept for the backend's writer
    done: list[str] = []
    monkeypatch.setattr("vllm_ext.worker.runner.commit", lambda *args: done.append("written"))
    monkeypatch.setattr(runner, "_slot_mappings_by_layer", dict)
    runner.compilation_config = SimpleNamespace(static_forward_context={})
    runner._commit(attention, [[2]])
    runner.mover = SimpleNamespace(commit=lambda *args: done.append("moved"))
    runner.prepare()
    assert not runner._step.attention.keep
    runner._commit(runner._step.attention, [[2]])
    assert done == ["written", "moved"]


def test_a_step_of_chains_is_left_alone() -> None:
    from vllm_ext.attention.tree_launch import LAUNCH_ATTRIBUTE

    runner = Runner({"x": TREE})
    runner.prepare()
    runner._drafting.trees = {"x": CHAIN}
    runner.scheduled.scheduled_spec_decode_tokens = {"x": list(CHAIN.tokens)}
    runner.query_start_loc.np = np.array([0, 3], dtype=np.int32)
    runner.prepare()
    runner._determine_batch_execution_and_padding(num_tokens=3)
    assert runner.graphs == {"num_tokens": 3}
    built, _ = runner._build_attention_metadata()
    assert not any(hasattr(md, LAUNCH_ATTRIBUTE) for md in built.values())


@pytest.mark.parametrize(
    ("given", "trees", "device"),
    [
        ({}, {"x": CHAIN, "y": TREE}, True),
        ({"no_penalties": False}, {"x": CHAIN, "y": TREE}, False),
        ({}, {"x": TokenTree.EMPTY}, False),  # one row each: vLLM's own step
    ],
)
def test_which_walk(
    given: dict[str, Any], trees: dict[str, TokenTree], device: bool, monkeypatch: Any
) -> None:
    used = []
    real = gpu.DeviceWalk
    monkeypatch.setattr(gpu, "DeviceWalk", lambda *args: used.append(1) or real(*args))
    runner = Runner(trees)
    runner.prepare()
    count = len(trees)
    runner.input_batch.sampling_metadata = metadata(
        count, prompt_token_ids=torch.zeros(count, 1, dtype=torch.int64), **given
    )
    rows = sum(len(tree) + 1 for tree in trees.values())
    logits = torch.nn.functional.one_hot(torch.full((rows,), 5), 16).float()
    assert runner._step is not None
    seen, walked = runner._verify(logits, runner._step)
    assert bool(used) == device
    assert seen.ids.shape == (rows, 8)
    assert isinstance(walked, WalkResult)
    expected = [[5, 5] if tree.tokens else [5] for tree in trees.values()]
    assert walked.tokens == expected
    # A device's walk waits for its forward pass, which is not work outside of it.
    assert runner.timed == []
    runner.walk_is_timed = True  # control: as on the CPU
    runner._verify(logits, runner._step)
    assert bool(runner.timed) != device


def test_our_runner_is_in_place_while_the_worker_makes_one() -> None:
    stock = gpu_model_runner.GPUModelRunner
    with gpu._runner_class(Runner):
        assert gpu_model_runner.GPUModelRunner is Runner
    assert gpu_model_runner.GPUModelRunner is stock


@pytest.mark.parametrize("reasons", [[None, None], [None, "no shared memory"]])
def test_one_rank_refuses_for_all(reasons: list[str | None], monkeypatch: Any) -> None:
    def gather(found: list[Any], mine: Any, group: Any) -> None:
        found[:] = reasons

    monkeypatch.setattr(gpu, "get_tp_group", lambda: SimpleNamespace(world_size=2, cpu_group=None))
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert agreed(None) == reasons[1]


@pytest.mark.parametrize("fails", [False, True])
def test_rows_are_learnt_while_the_device_computes(fails: bool, monkeypatch: Any) -> None:
    """After all is queued, and before the host waits for it."""
    runner = Runner({"x": TREE})
    runner.prepare()
    order: list[str] = []

    def catch_up() -> None:
        order.append("learn")
        if fails:
            raise ValueError("broken")

    def logged(name: str, real: Any) -> Any:
        return lambda *given: order.append(name) or real(*given)

    runner._drafting.catch_up = catch_up
    runner._sampled = None
    monkeypatch.setattr(gpu, "DeviceWalk", logged("queue", gpu.DeviceWalk))
    monkeypatch.setattr(gpu, "to_host", logged("wait", gpu.to_host))
    monkeypatch.setattr(runner, "_commit", lambda *step: order.append("commit"))
    logits = torch.nn.functional.one_hot(torch.full((4,), 5), 16).float()
    runner._sample(logits, None)
    assert order == ["queue", "learn", "wait", "commit"]
    if fails:  # what was verified stands; then drafting is begun anew, as after any failure
        with pytest.raises(ValueError, match="broken"):
            runner._draft(None, ["x"], [[5]], [], torch.zeros(4, 2))
        assert runner._late is None
    order.clear()
    runner.learns_later = False  # a CPU: nothing runs beside the host
    runner._sample(logits, None)
    assert order == ["queue", "wait", "commit"]


@pytest.mark.parametrize("penalties", [False, True])
def test_so_are_those_before_a_step_that_walks_otherwise(penalties: bool, monkeypatch: Any) -> None:
    """Without a draft, or row by row on the host: before the first look at the logits."""
    runner = Runner({"x": TREE if penalties else TokenTree.EMPTY})
    runner.prepare()
    order: list[str] = []
    runner._drafting.catch_up = lambda: order.append("learn")
    runner._sampled = None
    runner.input_batch.sampling_metadata = metadata(
        1, prompt_token_ids=torch.zeros(1, 1, dtype=torch.int64), no_penalties=not penalties
    )
    monkeypatch.setattr(
        "vllm_ext.worker.runner.candidates", lambda logits: order.append("look") or None
    )
    monkeypatch.setattr(runner, "_commit", lambda *step: None)
    monkeypatch.setattr(Stock, "_sample", lambda *given: None, raising=False)
    logits = torch.nn.functional.one_hot(torch.full((4,), 5), 16).float()
    runner._sample(logits[: 4 if penalties else 1], None)
    assert order == ["learn", "look"]


SPECULATED = 32


class Graphs:
    """The parts of vLLM's runner that decide which CUDA graphs there are; no device is asked."""

    # As vLLM chooses them for 64 requests: those of every engine, and those for decoding.
    common = (*(1, 2, 4), *range(8, 256, 8), *range(256, 513, 16))
    decoding = tuple((1 + SPECULATED) * n for n in (1, 2, 4, 8))

    def __init__(self, speculated: int = SPECULATED) -> None:
        sizes = {*self.common, *(self.decoding if speculated else ())}
        self.compilation_config = CompilationConfig(
            mode=CompilationMode.VLLM_COMPILE,
            cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
            cudagraph_capture_sizes=sorted(sizes),
            max_cudagraph_capture_size=512,
            splitting_ops=list(CompilationConfig._attention_ops),
        )
        self.vllm_config: Any = SimpleNamespace(
            compilation_config=self.compilation_config,
            num_speculative_tokens=speculated,
            scheduler_config=SimpleNamespace(max_num_seqs=64),
            lora_config=None,
        )
        self.kv_cache_config = self.speculative_config = None
        self.parallel_config = SimpleNamespace(tensor_parallel_size=1)  # asked by vLLM 0.31
        self.max_num_reqs = 64
        self.uniform_decode_query_len = 1 + speculated
        self.cudagraph_dispatcher = CudagraphDispatcher(self.vllm_config)

    _check_and_update_cudagraph_mode = (
        gpu_model_runner.GPUModelRunner._check_and_update_cudagraph_mode
    )

    def graph_for(self, *rows: int) -> tuple[str, int]:
        """Which kind of graph a step of requests with so many rows replays, and its rows."""
        uniform = gpu_model_runner.GPUModelRunner._is_uniform_decode(
            max(rows), self.uniform_decode_query_len, sum(rows), len(rows)
        )
        mode, size = self.cudagraph_dispatcher.dispatch(sum(rows), uniform_decode=uniform)
        return mode.name, size.num_tokens


class OurGraphs(TreeGPURunnerMixin, Graphs):  # type: ignore[misc]
    def __init__(self) -> None:
        Graphs.__init__(self)


def test_a_step_without_drafts_replays_a_full_graph_as_without_us() -> None:
    ours, stock, without = OurGraphs(), Graphs(), Graphs(speculated=0)
    for runner in (ours, stock, without):
        runner._check_and_update_cudagraph_mode([], [])
    for requests in range(1, 65):
        plain = (1,) * requests
        (mode, rows), (usual, most) = ours.graph_for(*plain), without.graph_for(*plain)
        assert mode == usual == "FULL"
        assert requests <= rows <= most  # the sizes for drafts come on top
    assert ours.graph_for(1, 1, 1) == ("FULL", 4)
    # What it is for: vLLM's own choice computes 33 rows for one.
    assert stock.graph_for(1) == ("PIECEWISE", 33)
    # A tree's rows are no decoding of many requests, and are hardly padded.
    assert ours.graph_for(7) == ("PIECEWISE", 8)
    assert ours.graph_for(1 + SPECULATED) == ("PIECEWISE", 33)
    assert ours.graph_for(1, 7, 1) == ("PIECEWISE", 16)
