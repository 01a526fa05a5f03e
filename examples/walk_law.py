# SPDX-License-Identifier: Apache-2.0
"""Whether the tokens of a walk follow the target's law: a table of p-values, with controls.

    python examples/walk_law.py --json walk_law.json

The target is a table of logits for every context over a tiny vocabulary, so that the law of a text
under given sampling parameters can be written down. Many requests with the same draft tree walk
through vLLM's own ``Sampler``; every text is completed to a fixed length with the target itself (a
walk emits a varying number of tokens), and the counts are compared with the exact joint law.

Per line and target: a chi-square test of the counts (cells that expect fewer than 5 are merged),
and the total variation distance beside the one that exact draws show,

    E TV = 1/2 sum_x sqrt(2 p_x (1 - p_x) / (pi N))

Over the targets of a line, p-values of a right sampler are uniform (Kolmogorov-Smirnov test). The
controls break the walk on purpose, and must be found out.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from scipy import stats
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from proposers.tree import TokenTree
from vllm_ext.cli import environment
from vllm_ext.cli.progress import progress
from vllm_ext.worker.walk import walk

VOCAB, LENGTH = 4, 3

# Root's children 1 and 2; 1's children 0 and 3; 2's child 2.
TREE = TokenTree((1, 2, 0, 3, 2), (-1, -1, 0, 0, 1), (0.5, 0.4, 0.3, 0.2, 0.1))

Options: TypeAlias = Mapping[str, float]
"""Sampling parameters by vLLM's names."""

Target: TypeAlias = Mapping[tuple[int, ...], NDArray[np.float32]]
Walk: TypeAlias = Callable[..., Any]

SETTINGS: tuple[Options, ...] = (
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 0.6, "top_k": 3},
    {"temperature": 1.0, "presence_penalty": 1.5},
    {"temperature": 0.6, "frequency_penalty": 0.7},
    {"temperature": 1.0, "repetition_penalty": 1.6},
    {"temperature": 0.8, "presence_penalty": 0.7, "top_k": 3, "top_p": 0.9},
)


def table(seed: int) -> dict[tuple[int, ...], NDArray[np.float32]]:
    """Logits of a random target after every context of up to LENGTH tokens."""
    rng = np.random.default_rng(seed)
    contexts = [c for n in range(LENGTH + 1) for c in itertools.product(range(VOCAB), repeat=n)]
    return {context: rng.normal(0, 1.5, VOCAB).astype(np.float32) for context in contexts}


def law(
    logits: NDArray[np.float32], context: tuple[int, ...], options: Options
) -> NDArray[np.float64]:
    """What vLLM's sampling parameters mean, written out: penalties, temperature, top-k, top-p."""
    x = logits.astype(np.float64)
    for token, count in Counter(context).items():
        factor = options.get("repetition_penalty", 1.0)
        x[token] = x[token] / factor if x[token] > 0 else x[token] * factor
        x[token] -= options.get("frequency_penalty", 0.0) * count
        x[token] -= options.get("presence_penalty", 0.0)
    x /= options["temperature"]
    if "top_k" in options:
        x[x < np.sort(x)[-int(options["top_k"])]] = -np.inf
    p: NDArray[np.float64] = np.exp(x - x.max())
    p /= p.sum()
    if "top_p" in options:
        order = np.argsort(p)
        keep = np.cumsum(p[order]) > 1 - options["top_p"]
        keep[-1] = True
        p[order[~keep]] = 0.0
        p /= p.sum()
    return p


def exact(target: Target, options: Options) -> NDArray[np.float64]:
    """Joint law of LENGTH tokens, flattened."""
    joint = np.ones((VOCAB,) * LENGTH)
    for tokens in itertools.product(range(VOCAB), repeat=LENGTH):
        for n in range(LENGTH):
            joint[tokens] *= law(target[tokens[:n]], tokens[:n], options)[tokens[n]]
    return joint.flatten()


def metadata(count: int, options: Options, **more: Any) -> SamplingMetadata:
    """vLLM's metadata of ``count`` requests with the same parameters and no text yet."""

    def full(value: float) -> torch.Tensor:
        return torch.full((count,), value)

    greedy = options["temperature"] == 0
    penalties = {
        "frequency_penalties": options.get("frequency_penalty", 0.0),
        "presence_penalties": options.get("presence_penalty", 0.0),
        "repetition_penalties": options.get("repetition_penalty", 1.0),
    }
    made: dict[str, Any] = {
        "temperature": None if greedy else full(options["temperature"]),
        "all_greedy": greedy,
        "all_random": not greedy,
        "top_p": full(options["top_p"]) if "top_p" in options else None,
        "top_k": full(options["top_k"]).int() if "top_k" in options else None,
        "generators": {},
        "max_num_logprobs": None,
        "no_penalties": list(penalties.values()) == [0.0, 0.0, 1.0],
        "prompt_token_ids": torch.full((count, 1), VOCAB),
        **{name: full(value) for name, value in penalties.items()},
        "output_token_ids": [[] for _ in range(count)],
        "allowed_token_ids_mask": None,
        "bad_words_token_ids": {},
        "logitsprocs": LogitsProcessors(),
    }
    return SamplingMetadata(**{**made, **more})


def sample(
    target: Target, options: Options, count: int, walker: Walk = walk
) -> tuple[NDArray[np.float64], float]:
    """Walk ``count`` requests at once and complete their texts with the target.

    Returns:
        Counts of the joint outcomes, flattened, and the mean number of drafted tokens accepted.
    """
    rows = torch.from_numpy(np.stack([target[path] for path in paths_of(TREE)]))
    given = metadata(count, options)
    result = walker(
        Sampler(),
        rows.repeat(count, 1),
        given,
        [TREE] * count,
        [i * len(rows) for i in range(count)],
        given.output_token_ids,
        lambda _: None,
    )
    assert given.output_token_ids == [[]] * count  # the path was taken off the histories
    rng = np.random.default_rng(int(torch.randint(2**31, (1,))))
    laws = {context: law(logits, context, options) for context, logits in target.items()}
    counts = np.zeros((VOCAB,) * LENGTH)
    for emitted in result.tokens:
        tokens = list(emitted[:LENGTH])
        while len(tokens) < LENGTH:
            tokens.append(int(rng.choice(VOCAB, p=laws[tuple(tokens)])))
        counts[tuple(tokens)] += 1
    return counts.flatten(), sum(map(len, result.paths)) / count


def paths_of(tree: TokenTree) -> list[tuple[int, ...]]:
    """Tokens on the path to the root and to every node."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        found.append(((*found[parent],) if parent >= 0 else ()) + (token,))
    return [(), *found]


def p_value(counts: NDArray[np.float64], joint: NDArray[np.float64]) -> float:
    """Chi-square test of goodness of fit; cells that expect fewer than 5 are merged."""
    expected = joint * counts.sum()
    if counts[joint == 0].sum():
        return 0.0
    order = np.argsort(expected)
    small = order[np.cumsum(expected[order]) < 5]
    big = np.setdiff1d(np.arange(len(joint)), small)
    observed = np.append(counts[big], counts[small].sum())
    wanted = np.append(expected[big], expected[small].sum())
    keep = wanted > 0
    return float(stats.chisquare(observed[keep], wanted[keep]).pvalue)


def distance(counts: NDArray[np.float64], joint: NDArray[np.float64]) -> float:
    """Total variation between the counts and the law."""
    return float(np.abs(counts / counts.sum() - joint).sum() / 2)


def floor(joint: NDArray[np.float64], count: int) -> float:
    """Total variation that so many exact draws show on average."""
    return float(np.sqrt(2 * joint * (1 - joint) / (np.pi * count)).sum() / 2)


def resampling_walk(
    sampler: Any, logits: Any, given: Any, trees: Any, starts: Any, *rest: Any
) -> Any:
    """Wrong: a draw that misses the children is thrown away and drawn again."""

    def again(**inputs: Any) -> Any:
        first = sampler(logits=inputs["logits"].clone(), sampling_metadata=given)
        second = sampler(logits=inputs["logits"].clone(), sampling_metadata=given)
        missed = [t not in TREE.tokens[:2] for t in first.sampled_token_ids[:, 0].tolist()]
        first.sampled_token_ids[missed] = second.sampled_token_ids[missed]
        return first

    return walk(again, logits, given, trees, starts, *rest)


def pruning_walk(sampler: Any, logits: Any, given: Any, trees: Any, starts: Any, *rest: Any) -> Any:
    """Wrong: a draw that the draft finds unlikely is replaced by the draft's favourite."""

    def pruned(**inputs: Any) -> Any:
        output = sampler(**inputs)
        output.sampled_token_ids[output.sampled_token_ids == 3] = 1
        return output

    return walk(pruned, logits, given, trees, starts, *rest)


def blind_walk(sampler: Any, logits: Any, given: Any, trees: Any, starts: Any, *rest: Any) -> Any:
    """Wrong: penalties do not see the path."""
    return walk(sampler, logits, given, trees, starts, [None] * len(trees), *rest[1:])


CONTROLS: tuple[tuple[str, Walk, Options], ...] = (
    ("control: draws again after a miss", resampling_walk, SETTINGS[0]),
    ("control: prunes after the draw", pruning_walk, SETTINGS[0]),
    ("control: penalties blind to the path", blind_walk, SETTINGS[6]),
)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table; p-values by target, total variations as means over targets."""

    name: str
    options: dict[str, float]
    targets: int
    draws: int
    accepted: float
    distance: float
    floor: float
    p_values: list[float]
    uniform_p: float


def measure(
    name: str, walker: Walk, options: Options, targets: int, draws: int, first: int
) -> Line:
    """Compare counts and law for several targets, whose seeds count up from ``first``."""
    p_values: list[float] = []
    distances, floors, accepted = [], [], []
    for seed in itertools.count(first):
        if len(p_values) == targets:
            break
        target = table(seed)
        joint = exact(target, options)
        if joint.max() * draws > draws - 5:
            continue  # one text is all but certain: nothing is left to test
        torch.manual_seed(seed)
        counts, taken = sample(target, options, draws, walker)
        p_values.append(p_value(counts, joint))
        distances.append(distance(counts, joint))
        floors.append(floor(joint, draws))
        accepted.append(taken)
    return Line(
        name,
        dict(options),
        targets,
        draws,
        float(np.mean(accepted)),
        float(np.mean(distances)),
        float(np.mean(floors)),
        p_values,
        float(stats.kstest(p_values, "uniform").pvalue),
    )


def markdown(lines: list[Line]) -> str:
    """The table of a report."""
    headers = ("walk", "targets", "draws each", "accepted", "TV", "TV of exact draws")
    header = f"| {' | '.join((*headers, 'smallest p', 'uniform p'))} |"
    rows = [
        f"| {line.name} | {line.targets} | {line.draws} | {line.accepted:.2f} "
        f"| {line.distance:.4f} | {line.floor:.4f} | {min(line.p_values):.2g} "
        f"| {line.uniform_p:.2g} |"
        for line in lines
    ]
    return "\n".join([header, "| --- |" + " ---: |" * 7, *rows])


def main(
    json_path: Annotated[Path, typer.Option("--json", help="Where the result is written.")],
    targets: Annotated[int, typer.Option(min=8, help="Random targets per line.")] = 20,
    draws: Annotated[int, typer.Option(min=1000, help="Texts per target.")] = 50_000,
) -> None:
    """Measure every setting and control; exit code 1 if one does not do what it must."""
    before = environment.describe()
    wanted = [
        (", ".join(f"{k} {v:g}" for k, v in options.items()), walk, options) for options in SETTINGS
    ]
    lines = []
    with progress("settings", len(wanted) + len(CONTROLS)) as advance:
        for name, walker, options in (*wanted, *CONTROLS):
            # Seeds of their own, or the lines would share their chance.
            first = 1000 * len(lines)
            lines.append(measure(name, walker, options, targets, draws, first))
            advance(1, name)
    result = {"environment": before, "lines": [asdict(line) for line in lines]}
    json_path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    typer.echo(markdown(lines))
    # Of all runs of a right walk one in a thousand fails (Bonferroni over its two kinds of test).
    tests = len(wanted) * (targets + 1)
    right = all(min(*x.p_values, x.uniform_p) > 0.001 / tests for x in lines[: len(wanted)])
    found_out = all(x.uniform_p < 1e-6 for x in lines[len(wanted) :])
    raise typer.Exit(0 if right and found_out else 1)


if __name__ == "__main__":
    typer.run(main)
