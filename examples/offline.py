# SPDX-License-Identifier: Apache-2.0
"""Generate text offline with `vllm.LLM` and a method of this package.

python examples/offline.py --model HuggingFaceTB/SmolLM2-135M-Instruct "Why is the sky blue?"
"""

from __future__ import annotations

import json
from typing import Annotated

import typer


def main(
    questions: Annotated[list[str], typer.Argument(help="What to ask, one answer each.")],
    model: Annotated[str, typer.Option(help="Model: a folder or a Hugging Face name.")],
    speculation: Annotated[
        str, typer.Option(help="speculative_config as JSON; see `vllm-ext methods`.")
    ] = '{"method": "dyspec"}',
    max_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    enforce_eager: Annotated[
        bool, typer.Option("--enforce-eager", help="Do not compile: starts faster on a CPU.")
    ] = False,
) -> None:
    """Answer questions with `vllm.LLM` and print how many tokens each step gave."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        max_model_len=2048,
        enforce_eager=enforce_eager,
        speculative_config=json.loads(speculation),
        disable_log_stats=False,  # keeps the counters that are read below
    )
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    chats = [[{"role": "user", "content": question}] for question in questions]
    outputs = llm.chat(chats, params)
    for question, output in zip(questions, outputs, strict=True):
        print(f"> {question}\n{output.outputs[0].text}\n")
    counters = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    accepted = counters["vllm:spec_decode_num_accepted_tokens"]
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(f"{tokens} tokens in {tokens - accepted:.0f} steps, {accepted:.0f} of them drafted")


if __name__ == "__main__":
    typer.run(main)
