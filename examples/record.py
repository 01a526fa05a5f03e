# SPDX-License-Identifier: Apache-2.0
"""Record what a model says to real prompts, so that drafting can be replayed without an engine.

    python examples/record.py --model MODEL --prompts a.jsonl b.jsonl --out recording.jsonl

Each line of the recording holds a prompt and its continuation as token ids, and the target's eight
most probable tokens with their probabilities at every position of the continuation. The model runs
through transformers in float32, one sequence at a time: slow, and free of batch effects.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_ext.cli.prompts import Prompt, load_prompts

WIDTH = 8


def spread(items: list[Prompt], most: int) -> list[Prompt]:
    """At most `most` items, evenly spaced, so that every part of a sorted file is represented."""
    if len(items) <= most:
        return items
    return [items[i * len(items) // most] for i in range(most)]


def token_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The prompt as a chat of one turn, if the tokenizer has a template."""
    if tokenizer.chat_template is None:
        return list(tokenizer(prompt.content)["input_ids"])
    messages = prompt.content
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.inference_mode()
def continuation(
    model: Any, prompt: list[int], temperature: float, max_tokens: int, seed: int
) -> Iterator[tuple[int, list[int], list[float]]]:
    """Each new token, with the target's best tokens in its place and their probabilities."""
    generator = torch.Generator().manual_seed(seed)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    output = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    for _ in range(max_tokens):
        logits = output.logits[0, -1].float()
        top = torch.softmax(logits, -1).topk(WIDTH)
        if temperature > 0:
            law = torch.softmax(logits / temperature, -1)
            token = int(torch.multinomial(law, 1, generator=generator))
        else:
            token = int(logits.argmax())
        yield token, top.indices.tolist(), [round(p, 6) for p in top.values.tolist()]
        if token in ends:
            return
        output = model(
            torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True
        )


def main() -> None:
    """Write the recording, one line per prompt and temperature."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder or Hugging Face name")
    parser.add_argument("--prompts", required=True, nargs="+", type=Path, help="JSONL files")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--per-task", type=int, default=8, help="prompts per task of a file")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--max-prompt", type=int, default=900, help="longer prompts are left out")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    done = 0
    with options.out.open("w", encoding="utf-8") as out:
        for file in options.prompts:
            tasks: dict[str, list[Prompt]] = {}
            for prompt in load_prompts(file):
                tasks.setdefault(prompt.task, []).append(prompt)
            for task, prompts in tasks.items():
                encoded = [
                    ids
                    for prompt in spread(prompts, options.per_task)
                    if len(ids := token_ids(tokenizer, prompt)) <= options.max_prompt
                ]
                for index, ids in enumerate(encoded):
                    for temperature in options.temperatures:
                        rows = list(
                            continuation(model, ids, temperature, options.max_tokens, index)
                        )
                        record = {
                            "set": file.parent.name or file.stem,
                            "task": task,
                            "temperature": temperature,
                            "prompt": ids,
                            "continuation": [token for token, _, _ in rows],
                            "top_ids": [top for _, top, _ in rows],
                            "top_probs": [probs for _, _, probs in rows],
                        }
                        out.write(json.dumps(record, separators=(",", ":")) + "\n")
                        out.flush()
                        done += 1
                        print(f"{done}: {file.parent.name} {task} T={temperature}", flush=True)


if __name__ == "__main__":
    main()
