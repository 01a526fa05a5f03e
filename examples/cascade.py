# SPDX-License-Identifier: Apache-2.0
"""Would a cascade of two draft models pay: the small one first, the large one where it is unsure?

    python examples/cascade.py --model TARGET --small DRAFT1 --large DRAFT2 \
        --prompts prompts.jsonl --out cascade.json

The idea is S2D's (arXiv 2407.01955) without its training. The target answers the prompts (greedy);
each draft reads the answers once, which tells its best token and its confidence at every place.
Then decoding with chains is replayed. A step drafts token by token: the small draft is asked, and
where its confidence is under `unsure` the large one too, whose token is taken; the chain ends where
the product of confidences falls under `stop`. Time is counted in measured passes (bfloat16, one
token each; the target by its number of rows): torch's, unless those that an engine logged at start
are given. The two thresholds are chosen on every other answer and judged on the rest.

What the replay gives the cascade for nothing: the large draft's catching up on tokens that it was
not asked about, and a switch between models. `oracle` knows where the small draft is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from vllm_ext import draft_vocab
from vllm_ext.cli.environment import describe
from vllm_ext.cli.prompts import load_prompts
from vllm_ext.distill.evaluate import Floats, Text, answers
from vllm_ext.distill.student import head_logits
from vllm_ext.distill.texts import LONGEST_EVALUATED, Encoder

MOST = 8  # drafted tokens of a chain
UNSURE = (0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
STOP = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.01)  # the last: never drafts


@dataclass(frozen=True)
class Guesses:
    """A draft at each token of an answer: its confidence, and whether its best token is right."""

    sure: Floats
    right: Floats


@dataclass(frozen=True)
class Costs:
    """Milliseconds of a pass: of the drafts, and of the target by rows (from 1)."""

    small: float
    large: float
    target: tuple[float, ...]


@torch.inference_mode()
def guesses(model: Any, vocab: Sequence[int] | None, text: Text) -> Guesses:
    """What a draft guesses along an answer."""
    tokens = torch.tensor([text.prompt + text.answer])
    hidden = model.model(tokens, use_cache=False).last_hidden_state[0, len(text.prompt) - 1 : -1]
    kept = torch.arange(model.config.vocab_size) if vocab is None else torch.tensor(vocab)
    best = head_logits(model, hidden, kept).softmax(-1).max(-1)
    right = kept[best.indices] == torch.tensor(text.answer)
    return Guesses(best.values.double().numpy(), right.double().numpy())


@torch.inference_mode()
def pass_ms(model: Any, rows: int, vocab: Sequence[int] | None = None, repeats: int = 20) -> float:
    """Median time of a pass over `rows` tokens behind 256 others."""
    cache = DynamicCache(config=model.config)
    model.model(torch.zeros((1, 256), dtype=torch.int64), past_key_values=cache)
    weight = model.get_output_embeddings().weight
    weight = weight if vocab is None else weight[torch.tensor(vocab)]
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        read = torch.zeros((1, rows), dtype=torch.int64)
        hidden = model.model(read, past_key_values=cache).last_hidden_state
        torch.nn.functional.linear(hidden, weight).argmax(-1).tolist()
        times.append(time.perf_counter() - begin)
        cache.crop(-rows)
    return 1e3 * float(np.median(times))


def logged(curve: str) -> tuple[float, ...]:
    """Milliseconds by rows, from 1 to `MOST` + 1, of a curve as the engine logs it.

    Args:
        curve: such as "1: 24.1, 4: 27.3, 16: 41.0".

    Raises:
        ValueError: it is no such curve.
    """
    points = sorted((int(rows), float(ms)) for rows, ms in (p.split(":") for p in curve.split(",")))
    rows, times = zip(*points, strict=True)
    return tuple(np.interp(range(1, MOST + 2), rows, times).tolist())


def replay(
    small: Guesses, large: Guesses, policy: str, unsure: float, stop: float, costs: Costs
) -> tuple[float, int]:
    """Milliseconds and target passes for one answer.

    Args:
        small: guesses of the small draft.
        large: of the large one.
        policy: ``small``, ``large``, ``cascade`` or ``oracle``.
        unsure: confidence of the small draft under which the large one is asked.
        stop: product of confidences under which a chain ends.
        costs: of passes.
    """
    place, spent, steps = 0, 0.0, 0
    while place < len(small.sure):
        product, drafted, accepted, wrong = 1.0, 0, 0, False
        # The last token of an answer needs no draft behind it.
        for at in range(place, min(place + MOST, len(small.sure) - 1)):
            if product < stop:
                break
            if policy == "large":
                up = True
                spent += costs.large
            else:
                up = {
                    "small": False,
                    "cascade": small.sure[at] < unsure,
                    "oracle": not small.right[at],
                }[policy]
                spent += costs.small + up * costs.large
            chosen = large if up else small
            product *= chosen.sure[at]
            if product < stop:
                break
            drafted += 1
            wrong = wrong or not chosen.right[at]
            accepted += not wrong
        spent += costs.target[drafted]
        steps += 1
        place += accepted + 1
    return spent, steps


def judge(
    texts: Sequence[tuple[Guesses, Guesses]], costs: Costs
) -> dict[str, dict[str, float | list[float]]]:
    """Each policy with its best thresholds, its speed against plain decoding and tokens per step.

    Args:
        texts: guesses of both drafts; thresholds are chosen on the even ones.
        costs: of passes.
    """
    found: dict[str, dict[str, float | list[float]]] = {}
    for policy in ("small", "large", "cascade", "oracle"):

        def spent(part: Sequence[int], unsure: float, stop: float, policy: str = policy) -> Floats:
            return np.array(
                [replay(*texts[i], policy, unsure, stop, costs) for i in part], np.float64
            )

        even, odd = range(0, len(texts), 2), range(1, len(texts), 2)
        grid = itertools.product(UNSURE if policy == "cascade" else UNSURE[:1], STOP)
        unsure, stop = min(grid, key=lambda pair: spent(even, *pair)[:, 0].sum())
        tokens = np.array([len(texts[i][0].sure) for i in odd], np.float64)
        judged = spent(odd, unsure, stop)
        draws = np.random.default_rng(0).integers(len(odd), size=(2000, len(odd)))
        ratios = costs.target[0] * tokens[draws].sum(1) / judged[draws, 0].sum(1)
        found[policy] = {
            "unsure": unsure,
            "stop": stop,
            "ratio": float(costs.target[0] * tokens.sum() / judged[:, 0].sum()),
            "interval": np.quantile(ratios, [0.025, 0.975]).tolist(),
            "tokens_per_step": float(tokens.sum() / judged[:, 1].sum()),
        }
    return found


def main() -> None:
    """Measure, replay and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--small", required=True, type=Path, help="draft with fewer layers")
    parser.add_argument("--large", required=True, type=Path)
    parser.add_argument("--prompts", required=True, type=Path)
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument(
        "--engine-ms",
        nargs=3,
        metavar=("SMALL", "LARGE", "TARGET"),
        help="passes as an engine logged them: of the drafts, and the target's curve by rows",
    )
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    encoder = Encoder(tokenizer, raw=False)
    encoded = [encoder.prompt(p.content, LONGEST_EVALUATED) for p in load_prompts(args.prompts)]
    prompts = [ids for ids in encoded if ids]
    prompts = [
        prompts[i * len(prompts) // args.limit] for i in range(min(args.limit, len(prompts)))
    ]
    folders = {"target": args.model, "small": args.small, "large": args.large}
    models: dict[str, Any] = {
        name: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        for name, folder in folders.items()
    }
    vocabs = {
        name: None if path is None else draft_vocab.load(path, models[name].config.vocab_size)
        for name, folder in folders.items()
        for path in (draft_vocab.path_of(None, folder),)
    }
    if args.engine_ms is None:
        costs = Costs(
            pass_ms(models["small"], 1, vocabs["small"]),
            pass_ms(models["large"], 1, vocabs["large"]),
            tuple(pass_ms(models["target"], rows) for rows in range(1, MOST + 2)),
        )
    else:
        small, large, curve = args.engine_ms
        costs = Costs(float(small), float(large), logged(curve))
    ends = [tokenizer.eos_token_id]
    texts, _ = answers(models["target"], prompts, ends, args.max_tokens, 0, lambda count: None)
    both = [
        (
            guesses(models["small"], vocabs["small"], text),
            guesses(models["large"], vocabs["large"], text),
        )
        for text in texts
    ]
    result = {
        "environment": describe(),
        "layers": {name: model.config.num_hidden_layers for name, model in models.items()},
        "texts": len(texts),
        "tokens": sum(len(text.answer) for text in texts),
        "passes": "torch" if args.engine_ms is None else "logged by an engine",
        "milliseconds": {"small": costs.small, "large": costs.large, "target": costs.target},
        "agreement": {
            name: float(np.concatenate([pair[i].right for pair in both]).mean())
            for i, name in enumerate(("small", "large"))
        },
        "policies": judge(both, costs),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in result.items() if k != "environment"}, indent=1))


if __name__ == "__main__":
    main()
