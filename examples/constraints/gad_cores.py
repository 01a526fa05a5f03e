# SPDX-License-Identifier: Apache-2.0
"""Programs under a grammar drawn by the package's cores, without an engine.

A drop-in for :func:`gad.draw`. The model's logits come from transformers and are kept per prefix,
so that hundreds of draws of the same few programs cost little more than one each. Requests run in
lock step, ``batch`` side by side, with the seeds that the engine would use.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import suite
from numpy.typing import NDArray

from logits_processors.bounded import BoundedConstraint
from logits_processors.cars import Cars
from logits_processors.law import SamplingLaw, logsumexp
from logits_processors.masking import Masking
from logits_processors.prefix_trie import PrefixTrie
from logits_processors.xgrammar_constraint import compile_xgrammar

_SEEDS_APART = 1 << 32
_LAW = SamplingLaw()


class Rows:
    """Next-token logits after one prompt, by prefix; one working cache of keys and values."""

    def __init__(self, model: Any, prompt: Sequence[int]) -> None:
        from transformers import DynamicCache

        self._model = model
        self._prompt = list(prompt)
        self._cache = DynamicCache()
        self._held: list[int] = []
        self._known: dict[tuple[int, ...], NDArray[np.float32]] = {}
        self._totals: dict[tuple[int, ...], float] = {}

    def __call__(self, prefix: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits ``float32[V]`` after the prompt and ``prefix``."""
        import torch

        key = tuple(prefix)
        if key not in self._known:
            wanted = [*self._prompt, *prefix]
            same = 0
            while same < min(len(self._held), len(wanted) - 1) and (
                self._held[same] == wanted[same]
            ):
                same += 1
            if surplus := len(self._held) - same:
                self._cache.crop(-surplus)
            with torch.inference_mode():
                logits = self._model(
                    torch.tensor([wanted[same:]]), past_key_values=self._cache, logits_to_keep=1
                ).logits
            self._held = wanted
            self._known[key] = logits[0, -1].float().numpy()
            self._totals[key] = logsumexp(self._known[key].astype(np.float64))
        return self._known[key]

    def log_prob(self, prefix: Sequence[int], token: int) -> float:
        """Return the log probability of ``token`` after the prompt and ``prefix``."""
        return float(self(prefix)[token]) - self._totals[tuple(prefix)]


class Source:
    """A model and its vocabulary, with a line break as one more end of text."""

    def __init__(self, name: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from logits_processors.vocabulary import Vocabulary

        self.tokenizer, known = suite.load_vocabulary(name)
        ends = self.tokenizer.encode("\n", add_special_tokens=False)
        self.vocabulary = Vocabulary.from_tokenizer(
            self.tokenizer, known.size, [*known.eos_ids, *ends]
        )
        self._model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
        self._model.eval()
        self._rows: tuple[str, Rows] | None = None

    def rows(self, prompt: str) -> Rows:
        """Return the logits after ``prompt``; those of the last one are kept."""
        if self._rows is None or self._rows[0] != prompt:
            self._rows = prompt, Rows(self._model, self.tokenizer.encode(prompt))
        return self._rows[1]


def draw(
    source: Source,
    row: dict[str, Any],
    method: str,
    *,
    samples: int,
    max_tokens: int,
    batch: int,
    max_attempts: int,
    seed: int,
) -> dict[str, Any]:
    """Draw programs of one task as :func:`gad.draw` does; for CARS with ``log_bound`` as well."""
    rows = source.rows(row["prompt"])
    compiled = compile_xgrammar("ebnf", row["grammar_ebnf"], source.vocabulary)
    trie = PrefixTrie()
    sampler: Any = Cars(_LAW, trie) if method == "cars" else Masking(_LAW)
    draws: list[dict[str, Any]] = []
    attempts = forwards = 0
    start = time.perf_counter()
    while len(draws) < samples and attempts < max_attempts:
        count = batch if method == "cars" else min(batch, samples - len(draws))
        running = []
        for i in range(count):
            constraint: Any = compiled.start()
            if method == "cars":
                constraint = BoundedConstraint(constraint, source.vocabulary, max_tokens)
            running.append(
                (i, sampler.start(constraint, seed * _SEEDS_APART + attempts + i), [], [])
            )
        ended: dict[int, dict[str, Any]] = {}
        while running:
            # Neighbours in this order share most of their prefix, so the working cache is of use.
            running.sort(key=lambda entry: entry[2])
            drawn = [sampler.step(state, rows(tokens)) for _, state, tokens, _ in running]
            left = []
            for (i, state, tokens, logs), made in zip(running, drawn, strict=True):
                forwards += 1
                if made.restart:
                    sampler.restart(state)
                    continue
                if made.token is None:
                    raise RuntimeError(f"{row['id']}: a dead end after {tokens}")
                logs.append(rows.log_prob(tokens, made.token))
                sampler.advance(state, made.token)
                tokens.append(made.token)
                complete = made.token in source.vocabulary.eos_ids
                if complete or len(tokens) == max_tokens:
                    ended[i] = {
                        "tokens": tokens,
                        "log_prob": sum(logs),
                        "log_weight": 0.0,
                        "state": "complete" if complete else "incomplete",
                    }
                else:
                    left.append((i, state, tokens, logs))
            running = left
        attempts += count
        draws += [ended[i] for i in sorted(ended)]
    found = {
        "draws": draws[:samples],
        "attempts": attempts,
        "forwards": forwards,
        "seconds": time.perf_counter() - start,
    }
    return found | {"log_bound": trie.root.log_live} if method == "cars" else found
