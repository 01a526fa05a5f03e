# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from logits_processors.session import Record
from logits_processors.vllm_v1 import V1Processor
from logits_processors.vllm_v2 import V2Processor
from vllm_ext.constraints.records import RPC, find_processor, install, merge_replies


def fields(name: str, token: int = 0) -> dict[str, Any]:
    return vars(Record(name, [token], [0.0], 1, 0, "complete"))


def made(kind: Any) -> Any:
    """A processor that only hands out records."""
    processor = object.__new__(kind)
    processor.records = lambda names: [fields(name) for name in names]
    return processor


def worker(v1: Any = (), v2: Any = ()) -> Any:
    runner = SimpleNamespace()
    if v1:
        runner.input_batch = SimpleNamespace(logitsprocs=SimpleNamespace(all=iter(v1)))
    if v2:
        runner.sampler = SimpleNamespace(logits_processors=list(v2))
    return SimpleNamespace(model_runner=runner)


def test_the_processor_is_found_in_either_runner() -> None:
    one, two = made(V1Processor), made(V2Processor)
    assert find_processor(worker(v1=[object(), one, made(V1Processor)])) is one
    assert find_processor(worker(v2=[object(), two])) is two
    assert find_processor(worker(v1=[object()])) is None
    assert find_processor(worker()) is None


def test_the_rpc_is_a_method_of_every_worker() -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    install()
    install()
    assert getattr(CPUWorker, RPC) is getattr(Worker, RPC)
    ask = getattr(CPUWorker, RPC)
    assert ask(worker(), ["a"]) == []
    assert ask(worker(v1=[made(V1Processor)]), ["a"]) == [fields("a")]


def test_ranks_say_the_same_and_replicas_do_not() -> None:
    ranks = [[fields("a", 1), fields("a", 2)], [fields("a", 1), fields("a", 2)]]
    assert [r.token_ids for r in merge_replies(["a", "b"], ranks)["a"]] == [[1], [2]]
    replicas = [[fields("a")], [], [fields("b")]]
    merged = merge_replies(["a", "b", "c"], replicas)
    assert {name: len(records) for name, records in merged.items()} == {"a": 1, "b": 1, "c": 0}
