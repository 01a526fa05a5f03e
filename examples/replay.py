# SPDX-License-Identifier: Apache-2.0
"""Replay drafting against recorded continuations and count what would have been accepted.

    python examples/record.py --model MODEL --prompts a.jsonl b.jsonl --out recording.jsonl
    python examples/replay.py --model MODEL --recording recording.jsonl --memo rows.npz --nodes 8 \
        --arm dyspec --arm 'unprimed=dyspec:{"prime": "off"}'

A step drafts a tree, walks it along the recorded text, learns from the target's candidates at every
row, and goes on: what the engine does, without an engine, so that drafters are compared by tokens
per step at equal rows, whatever machine this is. Rows of rejected nodes are answered by the model,
or with --memo-only by a file of its earlier answers. Latencies are not modelled: each arm drafts
`--nodes` nodes per step wherever it has them, best first.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from replay_jacobi import JacobiCount
from replay_rows import Rows

from proposers import CostModel, TokenTree, TreeDrafter, VerifiedRows
from vllm_ext.build import build_drafter, load_resources
from vllm_ext.methods import METHODS, parse_options


@dataclass(slots=True)
class Recording:
    """One line of the file that ``record.py`` writes."""

    set: str
    task: str
    temperature: float
    prompt: list[int]
    continuation: list[int]
    top_ids: list[list[int]]
    top_probs: list[list[float]]

    @property
    def text(self) -> list[int]:
        """The prompt and its continuation."""
        return self.prompt + self.continuation


@dataclass(slots=True)
class Replay:
    """What one recording gave: its steps, the tokens and the rows of these steps."""

    recording: Recording
    steps: int = 0
    tokens: int = 0
    rows: int = 0
    seconds: float = 0.0


class FreeRows(CostModel):
    """Every row is free, so a drafter drafts as many nodes as it may."""

    def __init__(self) -> None:
        super().__init__([(1, 1.0)], margin=0.0)


def replay(
    drafter: TreeDrafter,
    recording: Recording,
    rows: Rows,
    name: str,
    *,
    rejected: bool = True,
    jacobi: JacobiCount | None = None,
) -> Replay:
    """One request from its first token to its last.

    Args:
        drafter: keeps what it has learnt from earlier requests.
        recording: the request.
        rows: the target's candidates at rows off the recorded text.
        name: of the request.
        rejected: whether rows of rejected nodes are learnt from.
        jacobi: counts what Jacobi iteration would have guessed.
    """
    text, start = recording.text, len(recording.prompt)
    result = Replay(recording)
    recorded = {
        start + i: row
        for i, row in enumerate(zip(recording.top_ids, recording.top_probs, strict=True))
    }
    _observe(drafter, [((text[start - 2], text[start - 1]), recorded[start])])
    position = start + 1  # tokens that are known: the prompt and its first successor
    drafter.start(name, text[:position], greedy=recording.temperature == 0)
    while position < len(text):
        begin = time.process_time()
        (tree,) = drafter.propose([name])
        spent = time.process_time() - begin
        path = accepted_path(tree, text[position:])
        emitted = text[position : position + len(path) + 1]
        on_path = [((text[position - 2], text[position - 1]), recorded[position])]
        on_path += [
            ((text[p - 1], text[p]), recorded[p + 1])
            for p in range(position, position + len(path))
            if p + 1 in recorded
        ]
        off_path = []
        if len(tree) and (rejected or jacobi is not None):
            found, contexts = _rows(tree, text, position, rows)
            if rejected:
                off_path = [
                    (contexts[node], row)
                    for node, row in enumerate(found)
                    if row is not None and node not in path
                ]
            if jacobi is not None:
                jacobi.look(tree, path, found, text[position:])
        begin = time.process_time()
        _observe(drafter, off_path + on_path)
        drafter.extend(name, emitted)
        result.seconds += spent + time.process_time() - begin
        result.steps += 1
        result.tokens += len(emitted)
        result.rows += 1 + len(tree)
        position += len(emitted)
    drafter.stop(name)
    if jacobi is not None:
        jacobi.forget()
    return result


def accepted_path(tree: TokenTree, future: Sequence[int]) -> list[int]:
    """Nodes of the tree along `future`."""
    children, node, path = tree.children, -1, []
    for token in future:
        child = children[node].get(token)
        if child is None:
            break
        path.append(child)
        node = child
    return path


def _rows(
    tree: TokenTree, text: list[int], position: int, rows: Rows
) -> tuple[list[Any], list[tuple[int, int]]]:
    """The target's candidates at every node, `None` where unknown, and the nodes' contexts."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    contexts = [(p[-2] if len(p) > 1 else text[position - 1], p[-1]) for p in paths]
    return list(rows.of(text, position, paths)), contexts


def _observe(drafter: TreeDrafter, seen: list[tuple[tuple[int, int], Any]]) -> None:
    drafter.observe(
        VerifiedRows(
            np.array([context for context, _ in seen], np.int64),
            np.array([ids for _, (ids, _) in seen], np.int64),
            np.array([probs for _, (_, probs) in seen], np.float32),
            np.zeros(len(seen), np.int64),
        )
    )


def load(path: Path, temperature: float, seed: int) -> list[Recording]:
    """The recordings of one temperature that have steps to replay, shuffled."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    recordings = [Recording(**line) for line in lines]
    kept = [r for r in recordings if r.temperature == temperature and len(r.continuation) > 1]
    random.Random(seed).shuffle(kept)
    return kept


def rate(replays: Sequence[Replay]) -> float:
    """Tokens per step."""
    return sum(r.tokens for r in replays) / sum(r.steps for r in replays)


def interval(
    statistic: Callable[[Sequence[Any]], float], items: Sequence[Any], seed: int = 0
) -> tuple[float, float]:
    """95% bootstrap interval over the items (requests)."""
    generator = random.Random(seed)
    draws = sorted(statistic(generator.choices(items, k=len(items))) for _ in range(500))
    return draws[12], draws[487]


def ratio(pairs: Sequence[tuple[Replay, Replay]]) -> float:
    """Tokens per step of the first of each pair over those of the second, over all steps."""
    return rate([a for a, _ in pairs]) / rate([b for _, b in pairs])


def report(arms: dict[str, list[Replay]], out: Any = None) -> None:
    """A table of the arms, and tokens per step by set, to `out` or the standard output."""
    out = out or sys.stdout
    print(
        "| arm | tokens per step [95%] | rows per step | ratio to the first arm [95%] "
        "| drafting us per step |\n|---|---|---|---|---|",
        file=out,
    )
    first = next(iter(arms.values()))
    for name, replays in arms.items():
        steps = sum(r.steps for r in replays)
        low, high = interval(rate, replays)
        pairs = list(zip(replays, first, strict=True))
        below, above = interval(ratio, pairs)
        micros = 1e6 * sum(r.seconds for r in replays) / steps
        print(
            f"| {name} | {rate(replays):.3f} [{low:.2f}, {high:.2f}] "
            f"| {sum(r.rows for r in replays) / steps:.2f} "
            f"| {ratio(pairs):.3f} [{below:.3f}, {above:.3f}] | {micros:.0f} |",
            file=out,
        )
    sets = sorted({r.recording.set for r in first})
    print("\n| arm | " + " | ".join(sets) + " |\n|---" * 1 + "|---" * len(sets) + "|", file=out)
    for name, replays in arms.items():
        cells = [f"{rate([r for r in replays if r.recording.set == s]):.2f}" for s in sets]
        print(f"| {name} | " + " | ".join(cells) + " |", file=out)
    tokens = sum(r.tokens for r in first)
    print(
        f"\n{len(first)} requests, {tokens} tokens, median prompt "
        f"{statistics.median(len(r.recording.prompt) for r in first):.0f} tokens",
        file=out,
    )


@dataclass(frozen=True, slots=True)
class Target:
    """What of vLLM's model configuration the drafters ask for."""

    model: str
    vocab_size: int
    revision: str | None = None

    def get_vocab_size(self) -> int:
        """As in vLLM."""
        return self.vocab_size


@dataclass(frozen=True, slots=True)
class Arm:
    """A named drafter; `rejected`: whether it learns from rows of rejected nodes."""

    name: str
    method: str
    options: dict[str, Any]
    rejected: bool

    @classmethod
    def parse(cls, text: str) -> Arm:
        """From METHOD, or NAME=METHOD:{OPTIONS}; the option `learn_rejected` is ours."""
        name, _, spec = text.partition("=") if "=" in text.split(":")[0] else (text, "", text)
        method, _, body = spec.partition(":")
        options = json.loads(body) if body else {}
        return cls(name, method, options, options.pop("learn_rejected", True))

    def drafter(self, target: Target, nodes: int) -> TreeDrafter:
        """A fresh drafter that always drafts."""
        method = METHODS[self.method]
        given = {"max_nodes": nodes, "adaptive": False, "min_probability": 0.001, **self.options}
        known = {"max_nodes", *method.options.model_fields}
        options = parse_options(method, {k: v for k, v in given.items() if k in known})
        resources = load_resources(options, target, None)
        return build_drafter(method.name, options, resources, FreeRows())


def main() -> None:
    """Replay every arm at every temperature of the recording and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of the recorded model")
    parser.add_argument("--recording", required=True, type=Path)
    parser.add_argument("--memo", type=Path, help="file of the model's answers off the text")
    parser.add_argument("--memo-only", action="store_true", help="do not ask the model")
    parser.add_argument("--arm", required=True, action="append", help="METHOD or NAME=METHOD:JSON")
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--limit", type=int, help="requests per temperature")
    parser.add_argument("--jacobi", action="store_true", help="count Jacobi guesses (one arm)")
    parser.add_argument("--temperature", type=float, action="append")
    options = parser.parse_args()

    config = json.loads((Path(options.model) / "config.json").read_text(encoding="utf-8"))
    target = Target(options.model, config["vocab_size"])
    rows = Rows(options.memo, None if options.memo_only else options.model)
    for temperature in options.temperature or (0.0, 1.0):
        recordings = load(options.recording, temperature, seed=0)[: options.limit]
        results: dict[str, list[Replay]] = {}
        jacobi = JacobiCount() if options.jacobi else None
        print(f"\n## T={temperature:g}, {options.nodes} nodes\n", flush=True)
        for arm in map(Arm.parse, options.arm):
            drafter = arm.drafter(target, options.nodes)
            rows.asked = rows.known = 0
            results[arm.name] = [
                replay(drafter, recording, rows, str(i), rejected=arm.rejected, jacobi=jacobi)
                for i, recording in enumerate(recordings)
            ]
            rows.save()
            if rows.known < rows.asked:
                print(f"{arm.name}: {rows.known} of {rows.asked} rejected rows known")
        report(results)
        if jacobi is not None:
            print(f"\n{jacobi}")


if __name__ == "__main__":
    main()
