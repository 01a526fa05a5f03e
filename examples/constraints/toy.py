# SPDX-License-Identifier: Apache-2.0
"""Masking bends the model, the samplers of this package do not: shown where truth is known.

The language is finite, so the exact conditional law is enumerated on a real model; then every
method samples it thousands of times through the package's cores, and the divergence from the truth
is drawn against the number of samples, beside what a perfect sampler would show: one that draws
from the truth, and for weighted samples one that has as many exact draws as theirs are worth
(their effective sample size).

python examples/constraints/toy.py tasks.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct

Each line of tasks.jsonl has an "id", a "prompt" (plain text) and a "grammar_ebnf", as in
https://github.com/ebmoon/transformers-GAD.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import suite
import typer
from divergence import curve, kl, noise_floor, weight_summary
from language import Prefix, enumerate_language
from methods import DEAD, METHODS, Run, Toy
from numpy.typing import NDArray
from report import engine_table, table, write

from logits_processors.law import SamplingLaw
from logits_processors.vocabulary import Vocabulary
from logits_processors.xgrammar_constraint import compile_xgrammar
from vllm_ext.cli.progress import progress

CURVES = {
    "masking": ("masking", False),
    "masking, weighted": ("masking", True),
    "AWRS without its weights": ("awrs", False),
    "AWRS": ("awrs", True),
    "ASAp": ("asap", False),
    "ASAp, weighted": ("asap", True),
    "CARS": ("cars", False),
    "AWRS-SMC, 16 particles": ("smc", True),
}
"""What is drawn: the samples of which method, and whether their weights are used."""

WEIGHTED = {label: method for label, (method, weighted) in CURVES.items() if weighted}


class Model:
    """Next-token logits after a prompt, by Hugging Face transformers."""

    def __init__(self, name: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self._model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
        self._model.eval()
        self.vocabulary = Vocabulary.from_tokenizer(self.tokenizer, self._model.config.vocab_size)

    def encode(self, prompt: str, chat: bool) -> list[int]:
        """Return the prompt's token ids, as the user's turn of a chat or as it stands."""
        if not chat:
            return list(self.tokenizer.encode(prompt))
        turns = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def rows(self, prompt: Sequence[int], prefixes: Sequence[Prefix]) -> NDArray[np.floating]:
        """Return the logits ``float32[len(prefixes), V]`` after the prompt and each prefix."""
        with self._torch.inference_mode():
            batch = self._torch.tensor([[*prompt, *prefix] for prefix in prefixes])
            logits = self._model(batch, logits_to_keep=1).logits[:, -1]
        rows: NDArray[np.floating] = logits.float().numpy()
        return rows


def study(
    toy: Toy, counts: Sequence[int], repetitions: int, seed: int, name: str
) -> dict[str, Any]:
    """Run all methods ``repetitions`` times on one toy; plain types, see ``report``."""
    language = toy.language
    vocabulary = toy.compiled.vocabulary
    order = np.argsort(-language.truth)
    runs: dict[str, list[Run]] = {}
    with progress(name, len(METHODS) * repetitions) as advance:
        for method, run in METHODS.items():
            runs[method] = []
            for repetition in range(repetitions):
                # No two texts of a study may share their noise.
                first = seed + (len(runs) * repetitions + repetition) * 1_000_003
                runs[method].append(run(toy, max(counts), first))
                advance(1, method)
    weights = {method: weight_summary(runs[method]) for method in WEIGHTED.values()}
    return {
        "name": name,
        "mass": language.mass,
        "prefixes": len(language.rows),
        "texts": [
            {
                "text": vocabulary.spell(language.texts[i]).decode(),
                "truth": float(language.truth[i]),
                "masked": float(language.masked[i]),
            }
            for i in order
        ],
        "counts": list(counts),
        "repetitions": repetitions,
        "masking_limit": kl(language.truth, language.masked),
        "floor": noise_floor(language.truth, counts),
        "weighted_floors": {
            label: noise_floor(language.truth, counts, share=weights[method]["ess_share"])
            for label, method in WEIGHTED.items()
        },
        "curves": {
            label: [curve(language.truth, run, counts, weighted) for run in runs[method]]
            for label, (method, weighted) in CURVES.items()
        },
        "weights": weights,
        "costs": {method: _costs(of_method, language.texts) for method, of_method in runs.items()},
    }


def _costs(runs: Sequence[Run], texts: Sequence[Prefix]) -> dict[str, float]:
    samples = sum(run.texts.size for run in runs)
    rows = sum(run.rows for run in runs)
    return {
        "rows_per_text": rows / samples,
        "restarts_per_text": sum(run.restarts for run in runs) / samples,
        "checks_per_row": sum(run.checks for run in runs) / rows,
        "masks_per_row": sum(run.masks for run in runs) / rows,
        "dead_texts": sum(int((run.texts == DEAD).sum()) for run in runs),
    }


def main(
    tasks: Annotated[Path, typer.Argument(help="JSON lines with id, prompt and grammar_ebnf.")],
    model: Annotated[str, typer.Option(help="Model: a folder or a Hugging Face name.")],
    task: Annotated[
        list[str] | None, typer.Option(help="Only this id; may be repeated.  [default: all]")
    ] = None,
    samples: Annotated[int, typer.Option(min=16, help="Samples per repetition.")] = 2048,
    repetitions: Annotated[int, typer.Option(min=1)] = 8,
    chat: Annotated[
        bool, typer.Option(help="Put the prompt into the model's chat template.")
    ] = True,
    temperature: Annotated[float, typer.Option(min=0.01)] = 1.0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    seed: Annotated[int, typer.Option()] = 0,
    engine: Annotated[
        int,
        typer.Option(
            min=0,
            help="Also draw so many texts per method through vLLM, to compare with the cores.",
        ),
    ] = 0,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write all numbers here.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the picture of the first task.")] = None,
) -> None:
    """Measure every method against the enumerated truth."""
    lines = tasks.read_text(encoding="utf-8").splitlines()
    chosen = [row for row in map(json.loads, lines) if not task or row["id"] in task]
    if not chosen:
        raise typer.BadParameter(f"no line of {tasks} has an id of {task}")
    environment = suite.environment(model, dtype)
    source, law = Model(model, dtype), SamplingLaw(temperature)
    counts = [2**k for k in range(4, 40) if 2**k <= samples]
    prompts: list[list[int]] = []
    studies, toys = [], []
    for row in chosen:
        compiled = compile_xgrammar("ebnf", row["grammar_ebnf"], source.vocabulary)
        prompts.append(source.encode(row["prompt"], chat))
        language = enumerate_language(compiled, partial(source.rows, prompts[-1]), law)
        toys.append(Toy(compiled, language, law))
        studies.append(study(toys[-1], counts, repetitions, seed, row["id"]))
        typer.echo(table(studies[-1]))
    result: dict[str, Any] = {
        "environment": environment,
        "settings": {
            "model": environment["model"],
            "dtype": dtype,
            "chat": chat,
            "temperature": temperature,
            "seed": seed,
        },
        "studies": studies,
    }
    if engine:
        from on_engine import compare

        result["engine"] = compare(
            model, dtype, prompts[0], chosen[0]["grammar_ebnf"], toys[0], engine, seed
        )
        typer.echo(engine_table(result["engine"]))
    if json_path:
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write(result, markdown, plot)


if __name__ == "__main__":
    typer.run(main)
