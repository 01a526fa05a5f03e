# SPDX-License-Identifier: Apache-2.0
"""Ask a running server through the `openai` client, and print the answer as it arrives.

vllm serve MODEL --speculative-config '{"method": "dyspec"}'
python examples/online.py "Why is the sky blue?"
"""

from __future__ import annotations

from typing import Annotated

import typer


def main(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    url: Annotated[str, typer.Option(help="Address of the server.")] = "http://localhost:8000/v1",
    model: Annotated[
        str | None, typer.Option(help="Model name.  [default: the first that the server lists]")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
) -> None:
    """Stream one answer. The client needs to know nothing about speculation."""
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none")
    stream = client.chat.completions.create(
        model=model or client.models.list().data[0].id,
        messages=[{"role": "user", "content": question}],
        max_tokens=max_tokens,
        temperature=temperature,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    typer.run(main)
