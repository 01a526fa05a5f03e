# SPDX-License-Identifier: Apache-2.0
"""The toy through the real engine: the same seeds must give the texts that the cores give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from methods import Toy, populations, sampler_of, single
from numpy.typing import NDArray

from logits_processors.compilation import Spec
from logits_processors.prefix_trie import PrefixTrie

METHODS = ("masking", "awrs", "asap", "cars")


def compare(
    model: str, dtype: str, prompt: Sequence[int], grammar: str, toy: Toy, count: int, seed: int
) -> list[dict[str, Any]]:
    """Draw ``count`` texts per method by vLLM and by the cores; plain types, a row per method.

    One text at a time, because a trie learns in the order in which texts are drawn; ASAp and CARS
    share it, as in the engine. The law of ``toy`` must have top_k and top_p off.
    """
    from vllm import LLM, SamplingParams

    from vllm_ext import constraints, smc

    llm = LLM(model, dtype=dtype, enforce_eager=True, max_model_len=256, disable_log_stats=True)
    longest = max(map(len, toy.language.texts))
    found, trie = [], PrefixTrie()
    for method in METHODS:
        sampler = sampler_of(method, toy.law, trie)
        theirs, ours = [], []
        for i in range(count):
            keys = {
                "constraint_ebnf": grammar,
                "constraint_method": method,
                "constraint_seed": seed + i,
            }
            params = SamplingParams(
                temperature=toy.law.temperature, max_tokens=longest, extra_args=keys
            )
            [sample] = constraints.generate(llm, [{"prompt_token_ids": list(prompt)}], params)
            theirs.append((tuple(sample.token_ids), sample.log_weight, sample.attempts))
            ours.append(single(toy, sampler, seed + i))
        found.append(_agreement(method, theirs, ours))
    options: dict[str, Any] = {
        "particles": 16,
        "ess": 0.5,
        "tokens_per_round": 1,
        "max_tokens": longest,
    }
    theirs, ours = [], []
    for i in range(max(1, count // 16)):
        drawn = smc.sample(llm, prompt, Spec("ebnf", grammar), seed=seed + i, **options)
        theirs += [(p.tokens, p.log_weight, 1) for p in drawn.particles]
        [expected] = populations(toy, 1, seed + i)
        ours += [(p.tokens, p.log_weight, 1) for p in expected.particles]
    found.append(_agreement("smc", theirs, ours))
    return found


def _agreement(
    method: str,
    theirs: Sequence[tuple[tuple[int, ...], float, int]],
    ours: Sequence[tuple[tuple[int, ...], float, int]],
) -> dict[str, Any]:
    same = [a[0] == b[0] for a, b in zip(theirs, ours, strict=True)]
    weights: NDArray[np.float64] = np.array(
        [abs(a[1] - b[1]) for a, b, equal in zip(theirs, ours, same, strict=True) if equal]
    )
    return {
        "method": method,
        "texts": len(same),
        "same_texts": sum(same),
        "same_attempts": sum(a[2] == b[2] for a, b in zip(theirs, ours, strict=True)),
        "attempts": sum(a[2] for a in theirs),
        "largest_log_weight_difference": float(weights.max(initial=0.0)),
    }
