# SPDX-License-Identifier: Apache-2.0
"""PEARL's overlap as a picture: when the target ran, and when the draft model did.

    python examples/pearl_timeline.py --model TARGET --draft DRAFT --out pearl

writes OUT.png and OUT.json, which says how much of the drafting was hidden beside target steps, and
prints it. The engine needs a core that its own threads leave free; vLLM reserves one by default.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from vllm_ext.cli.environment import describe

PROMPT = "Explain in a few sentences why the sky is blue, and then why sunsets are red."


def main() -> None:
    """Trace one run and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--draft", required=True, help="a draft model with the same tokenizer")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12, help="steps of a picture")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        os.environ["VLLM_EXT_TRACE"] = str(trace)
        text = _run(args)
        spans = json.loads(trace.read_text().rstrip().rstrip(",") + "]")
    result = {
        "model": Path(args.model).name,
        "draft": Path(args.draft).name,
        "dtype": args.dtype,
        "batch": args.batch,
        **_overlap(spans),
        "text": text,
        "environment": describe(),
    }
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    _draw(spans, args)
    print(json.dumps(result, indent=2))


def _run(args: argparse.Namespace) -> str:
    from vllm import LLM, SamplingParams

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    engine = LLM(
        args.model,
        dtype=args.dtype,
        enforce_eager=True,
        max_model_len=1024,
        # Not adaptive: a draft model that does not pay would soon be left out of the picture.
        speculative_config={
            "method": "pearl",
            "model": args.draft,
            "adaptive": False,
            "num_speculative_tokens": 4,
        },
    )
    params = SamplingParams(temperature=0.0, max_tokens=args.tokens, ignore_eos=True)
    chats: Any = [[{"role": "user", "content": PROMPT}]] * args.batch
    engine.chat(chats, params)  # the first text measures the draft model's passes
    outputs = engine.chat(chats, params)
    engine.llm_engine.engine_core.shutdown()
    return outputs[0].outputs[0].text


def _overlap(spans: list[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds of each model, and of the draft model while the target ran."""
    target = [(s["ts"], s["ts"] + s["dur"]) for s in spans if s["name"] == "target"]
    draft = [(s["ts"], s["ts"] + s["dur"]) for s in spans if s["name"] == "draft"]

    def together(a: tuple[float, float], b: tuple[float, float]) -> float:
        return max(0.0, min(a[1], b[1]) - max(a[0], b[0]))

    def middle(part: list[tuple[float, float]]) -> float | None:
        return round(median(end - begin for begin, end in part) / 1e3, 1) if part else None

    hidden = sum(together(one, other) for one in draft for other in target)
    drafting = sum(end - begin for begin, end in draft)
    shared = [one for one in target if any(together(one, other) for other in draft)]
    beside = [one for one in draft if any(together(one, other) for other in target)]
    return {
        "target_steps": len(target),
        "target_ms": round(sum(end - begin for begin, end in target) / 1e3, 1),
        "target_ms_median_alone": middle([one for one in target if one not in shared]),
        "target_ms_median_with_drafting_beside": middle(shared),
        "draft_passes": len(draft),
        "draft_ms": round(drafting / 1e3, 1),
        "draft_ms_median_in_line": middle([one for one in draft if one not in beside]),
        "draft_ms_median_beside": middle(beside),
        "draft_ms_beside_the_target": round(hidden / 1e3, 1),
        "share_hidden": round(hidden / drafting, 3) if drafting else None,
    }


def _draw(spans: list[dict[str, Any]], args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    targets = [s for s in spans if s["name"] == "target"][:-1]
    drafts = [s for s in spans if s["name"] == "draft"]
    beside = [sum(t["ts"] <= d["ts"] < t["ts"] + t["dur"] for d in drafts) for t in targets]
    # Where most was drafted beside the target, and the end, when it has learnt whether that pays.
    last = max(0, len(targets) - args.steps)
    most = max(range(last + 1), key=lambda first: sum(beside[first : first + args.steps]))
    figure, panels = plt.subplots(2, 1, figsize=(10, 4.4))
    for axes, first, name in ((panels[0], most, "most beside"), (panels[1], last, "the end")):
        window = targets[first : first + args.steps]
        begin, end = window[0]["ts"], window[-1]["ts"] + window[-1]["dur"]
        for row, (part, colour) in enumerate(((drafts, "tab:orange"), (targets, "tab:blue"))):
            shown = [
                ((s["ts"] - begin) / 1e3, s["dur"] / 1e3) for s in part if begin <= s["ts"] < end
            ]
            axes.broken_barh(shown, (row - 0.35, 0.7), color=colour, edgecolor="white")
        axes.set_yticks([0, 1], ["draft model", "target"])
        axes.set_title(f"steps {first} to {first + len(window) - 1} ({name})", fontsize=9)
    panels[1].set_xlabel("milliseconds")
    names = Path(args.draft).name, Path(args.model).name
    figure.suptitle(f"PEARL: {names[0]} beside {names[1]}, {args.dtype}")
    figure.tight_layout()
    figure.savefig(args.out.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
