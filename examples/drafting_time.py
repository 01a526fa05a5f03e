# SPDX-License-Identifier: Apache-2.0
"""What drafting costs by itself: milliseconds per step and memory, without an engine.

    python examples/drafting_time.py --json drafting.json

Each step is what an engine asks of the default dyspec: learn from the target's rows, append the
tokens that were emitted, draft the next trees. Texts are random words by Zipf's law in which
earlier passages come back, so that suffix matching and recycling have something to find; a tenth
more steps come before, to fill the tables. "sized" lets the cost model choose the trees on the
latency curve given by --curve, "full" drafts all nodes in every step. Memory is what Python's
tracemalloc counts, NumPy's tables included, in a run of its own. Run it on a quiet machine.
"""

from __future__ import annotations

import functools
import gc
import json
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from proposers import CostModel, TokenTree, TreeDrafter, VerifiedRows
from vllm_ext.build import Resources, build_drafter
from vllm_ext.cli import environment
from vllm_ext.cli.options import parse_batches
from vllm_ext.cli.progress import progress
from vllm_ext.methods import METHODS, parse_options

METHOD = METHODS["dyspec"]
WORDS = 4000
EXPONENT = 1.1  # of Zipf's law, about that of English
REPEAT_SHARE = 0.5  # of the text is copied from earlier in it
PASSAGE = 24  # mean tokens of a copied passage
CANDIDATES = 8
MAX_DEPTH: int = parse_options(METHOD, {}).max_depth  # type: ignore[attr-defined]
# Seconds of a step by rows: SmolLM2-135M on 2 cores without AVX-512.
CURVE = "1:0.0325,7:0.037,17:0.056,65:0.145"


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table; times in milliseconds per step of the whole batch."""

    trees: str
    batch: int
    context: int
    steps: int
    nodes: float
    tokens: float
    learn_ms: dict[str, float]
    propose_ms: dict[str, float]
    total_ms: dict[str, float]
    request_kib: float
    global_mib: float


class Language:
    """Texts, and a target that knows how they go on."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        words = self._rng.permutation(vocab_size)[: min(WORDS, vocab_size)]
        law = 1.0 / np.arange(1, len(words) + 1) ** EXPONENT
        self._words, self._law = words, law / law.sum()
        self._candidates = self._draw(vocab_size * CANDIDATES).reshape(vocab_size, CANDIDATES)
        self._probs = np.float32(0.5) ** np.arange(1, CANDIDATES + 1, dtype=np.float32)

    def text(self, length: int) -> list[int]:
        """Random words and copies of earlier passages in turn."""
        text: list[int] = self._draw(PASSAGE).tolist()
        while len(text) < length:
            size = int(self._rng.geometric(1 / PASSAGE))
            if self._rng.random() < REPEAT_SHARE:
                start = int(self._rng.integers(len(text)))
                text += text[start : start + size]
            else:
                text += self._draw(size).tolist()
        return text[:length]

    def rows(self, contexts: list[tuple[int, int]], following: list[int]) -> VerifiedRows:
        """The target's candidates behind each context; -1 follows where the text does not go."""
        ids = self._candidates[[last for _, last in contexts]]
        after = np.array(following)
        ids[after >= 0, 0] = after[after >= 0]
        probs = np.broadcast_to(self._probs, ids.shape).copy()
        namespaces = np.zeros(len(contexts), np.int64)
        return VerifiedRows(np.array(contexts, np.int64), ids, probs, namespaces)

    def _draw(self, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return self._rng.choice(self._words, count, p=self._law).astype(np.int64)


@dataclass(slots=True)
class Request:
    """A text of which the first `known` tokens have been emitted."""

    name: str
    text: list[int]
    known: int

    def verify(self, tree: TokenTree) -> tuple[list[tuple[int, int]], list[int], int]:
        """Contexts of the rows, what the text has behind each, and how many tokens are emitted."""
        before, root = self.text[self.known - 2], self.text[self.known - 1]
        contexts, following = [(before, root)], [self.text[self.known]]
        accepted = {-1: 0}  # depth of the nodes on the text
        for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
            contexts.append((root if parent < 0 else tree.tokens[parent], token))
            depth = accepted.get(parent)
            on_text = depth is not None and token == self.text[self.known + depth]
            if on_text and depth is not None:
                accepted[node] = depth + 1
            following.append(self.text[self.known + accepted[node]] if on_text else -1)
        return contexts, following, 1 + max(accepted.values())


class Bench:
    """A drafter with a batch of requests, and what each step took."""

    def __init__(self, language: Language, requests: list[Request], drafter: TreeDrafter) -> None:
        self._language, self._drafter, self._requests = language, drafter, requests
        for request in requests:
            drafter.start(request.name, request.text[: request.known], greedy=True)
        self._trees = [TokenTree.EMPTY] * len(requests)
        self.learn: list[float] = []
        self.propose: list[float] = []
        self.nodes = self.tokens = 0

    def step(self) -> None:
        """Verify, learn, draft; only the drafter's part is timed."""
        contexts: list[tuple[int, int]] = []
        following: list[int] = []
        emitted: list[list[int]] = []
        for request, tree in zip(self._requests, self._trees, strict=True):
            more, after, count = request.verify(tree)
            contexts += more
            following += after
            emitted.append(request.text[request.known : request.known + count])
            request.known += count
            self.nodes += len(tree)
            self.tokens += count
        rows = self._language.rows(contexts, following)
        names = [request.name for request in self._requests]
        start = time.perf_counter()
        self._drafter.observe(rows)
        for name, tokens in zip(names, emitted, strict=True):
            self._drafter.extend(name, tokens)
        learned = time.perf_counter()
        self._trees = self._drafter.propose(names)
        self.learn.append(learned - start)
        self.propose.append(time.perf_counter() - learned)

    def forget(self) -> None:
        """Drop the figures so far."""
        self.learn, self.propose, self.nodes, self.tokens = [], [], 0, 0

    def stop(self) -> None:
        """End all requests."""
        self._trees = []
        for request in self._requests:
            self._drafter.stop(request.name)


@dataclass(frozen=True, slots=True)
class Case:
    """One combination to measure."""

    trees: str
    batch: int
    context: int
    steps: int
    vocab_size: int
    curve: list[tuple[int, float]]

    @property
    def all_steps(self) -> int:
        """With the warm-up."""
        return self.steps + self.steps // 10

    def measure(self, on_step: Callable[[], None]) -> Result:
        """Time all steps, then run them again to count memory."""
        timed = Bench(*self._texts(), self._drafter())
        for step in range(self.all_steps):
            if step == self.all_steps - self.steps:
                timed.forget()
            timed.step()
            on_step()
        request_bytes, global_bytes = self._memory(on_step)
        return Result(
            trees=self.trees,
            batch=self.batch,
            context=self.context,
            steps=self.steps,
            nodes=timed.nodes / self.steps / self.batch,
            tokens=timed.tokens / self.steps / self.batch,
            learn_ms=spread_ms(timed.learn),
            propose_ms=spread_ms(timed.propose),
            total_ms=spread_ms([a + b for a, b in zip(timed.learn, timed.propose, strict=True)]),
            request_kib=request_bytes / 2**10,
            global_mib=global_bytes / 2**20,
        )

    def _memory(self, on_step: Callable[[], None]) -> tuple[float, float]:
        """Bytes per request while all run, and bytes that stay when all have ended."""
        language, requests = self._texts()  # the engine's, hence not counted
        tracemalloc.start()
        try:
            bench = Bench(language, requests, self._drafter())
            for _ in range(self.all_steps):
                bench.step()
                on_step()
            bench.forget()
            running = traced_bytes()
            bench.stop()
            stays = traced_bytes()
        finally:
            tracemalloc.stop()
        return (running - stays) / self.batch, stays

    def _texts(self) -> tuple[Language, list[Request]]:
        language = Language(self.vocab_size, seed=0)
        length = self.context + self.all_steps * (1 + MAX_DEPTH) + 1
        names = map(str, range(self.batch))
        return language, [Request(name, language.text(length), self.context) for name in names]

    def _drafter(self) -> TreeDrafter:
        full = self.trees == "full"
        options = parse_options(METHOD, {"adaptive": not full, "max_depth": MAX_DEPTH})
        # As in the engine: without a cost model every row is free.
        cost = CostModel([(1, 1.0)], margin=0.0) if full else CostModel(self.curve)
        return build_drafter(METHOD.name, options, Resources(self.vocab_size), cost)


def traced_bytes() -> int:
    """What is allocated now, by tracemalloc's count."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def spread_ms(seconds: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile in milliseconds."""
    low, median, high = np.quantile(np.array(seconds) * 1e3, [0.1, 0.5, 0.9]).tolist()
    return {"median": median, "p10": low, "p90": high}


def markdown(results: list[Result]) -> str:
    """The table."""
    lines = [
        "| trees | batch | context | nodes | tokens per step | learn ms | propose ms "
        "| both ms: median [10%, 90%] | KiB per request | global MiB |",
        "|" + "---|" * 10,
    ]
    lines += [
        f"| {r.trees} | {r.batch} | {r.context} | {r.nodes:.1f} | {r.tokens:.2f} "
        f"| {r.learn_ms['median']:.2f} | {r.propose_ms['median']:.2f} "
        f"| {r.total_ms['median']:.2f} [{r.total_ms['p10']:.2f}, {r.total_ms['p90']:.2f}] "
        f"| {r.request_kib:.0f} | {r.global_mib:.1f} |"
        for r in results
    ]
    return "\n".join(lines)


def parse_curve(text: str) -> list[tuple[int, float]]:
    """ROWS:SECONDS pairs.

    Raises:
        typer.BadParameter: It is anything else.
    """
    try:
        pairs = [pair.split(":") for pair in text.split(",")]
        return [(int(rows), float(seconds)) for rows, seconds in pairs]
    except ValueError as error:
        raise typer.BadParameter(f"curve {text!r}: give ROWS:SECONDS,..., e.g. {CURVE}") from error


def main(
    json_path: Annotated[Path, typer.Option("--json", help="Where the result is written.")],
    batch: Annotated[str, typer.Option(help="Comma-separated batch sizes.")] = "1,8,32",
    context: Annotated[
        str, typer.Option(help="Comma-separated tokens of each text at the first step.")
    ] = "300,2000",
    steps: Annotated[int, typer.Option(min=10, help="Steps that count.")] = 300,
    vocab_size: Annotated[int, typer.Option(min=CANDIDATES, help="Of the target.")] = 49_152,
    curve: Annotated[str, typer.Option(help="ROWS:SECONDS of a step, for sized trees.")] = CURVE,
) -> None:
    """Measure the drafting of the default dyspec by itself, without an engine."""
    cases = [
        Case(trees, size, length, steps, vocab_size, parse_curve(curve))
        for trees in ("sized", "full")
        for size in parse_batches(batch)
        for length in parse_batches(context)
    ]
    results = []
    before = environment.describe()
    with progress("measuring", sum(2 * case.all_steps for case in cases)) as advance:
        for case in cases:
            doing = f"{case.trees}, batch {case.batch}, context {case.context}"
            results.append(case.measure(functools.partial(advance, 1, doing)))
    written = {
        "environment": {**before, "load_average_after": environment.describe()["load_average"]},
        "settings": {"vocab_size": vocab_size, "curve": curve},
        "results": [asdict(result) for result in results],
    }
    json_path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    typer.echo(markdown(results))
    typer.echo(f"\nwritten: {json_path}")


if __name__ == "__main__":
    typer.run(main)
