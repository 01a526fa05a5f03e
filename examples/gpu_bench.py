# SPDX-License-Identifier: Apache-2.0
"""What tree verification costs on this machine's GPU.

python examples/gpu_bench.py kernel                # needs torch and Triton only
python examples/gpu_bench.py step                  # needs vLLM; random weights, nothing is fetched

Both print a table, and with --json FILE keep the numbers.  Without a GPU the kernel part runs in
Triton's interpreter (TRITON_INTERPRET=1 and a few small sizes), to see that it works; its times
then mean nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    kernel = parts.add_parser("kernel", help="attention of one layer")
    kernel.add_argument("--batch", type=numbers, default=(1, 8, 64))
    kernel.add_argument("--context", type=numbers, default=(512, 2048, 8192, 32768))
    kernel.add_argument("--nodes", type=numbers, default=(1, 8, 16, 32, 64))
    step = parts.add_parser("step", help="whole engine steps, by nodes")
    step.add_argument("--config", type=Path, help="config.json of a model  [default: Llama-8B]")
    step.add_argument("--batch", type=numbers, default=(1, 8))
    step.add_argument("--nodes", type=numbers, default=(0, 4, 8, 16, 32, 64))
    step.add_argument("--context", type=int, default=512)
    step.add_argument("--tokens", type=int, default=128)
    for part in (kernel, step):
        part.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    measured = measure_kernel(options) if options.part == "kernel" else measure_steps(options)
    if options.json is not None:
        report = {"part": options.part, "machine": machine(), **measured}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def numbers(text: str) -> tuple[int, ...]:
    """Numbers with commas between them."""
    return tuple(int(number) for number in text.split(","))


def machine() -> dict[str, str]:
    """What the numbers hold for."""
    import triton

    found = {"python": platform.python_version(), "torch": torch.__version__}
    found["triton"] = triton.__version__
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
    else:
        found["device"] = f"{platform.machine()} CPU: times of kernels mean nothing"
    return found


def measure_kernel(options: argparse.Namespace) -> dict[str, Any]:
    """Correctness on the device, then times."""
    from vllm_ext.attention import measure
    from vllm_ext.attention.measure_flash import Flash

    if not torch.cuda.is_available() and not measure.INTERPRETED:
        sys.exit("error: no GPU here; set TRITON_INTERPRET=1 and small sizes to try it without")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flash = Flash.installed() if device.type == "cuda" else None
    errors: list[dict[str, Any]] = []
    for shape in measure.SHAPES:
        for nodes in options.nodes:
            for dtype in (torch.float32, torch.bfloat16):
                bench = measure.Bench(shape, 2, min(options.context), nodes, dtype, device)
                found = {"shape": shape.name, "nodes": nodes, "dtype": str(dtype)}
                errors.append({**found, "route": "tree", "relative_error": bench.error()})
                if flash and dtype != torch.float32:
                    error = bench.error(flash.contexts(bench))
                    route = "FlashAttention + tree"
                    errors.append({**found, "route": route, "relative_error": error})
    for dtype, route in sorted({(e["dtype"], e["route"]) for e in errors}):
        same = [e for e in errors if (e["dtype"], e["route"]) == (dtype, route)]
        worst = max(e["relative_error"] for e in same)
        print(f"largest relative error against float64, {route}, {dtype}: {worst:.2g}")
    rate = measure.copy_rate(device)
    print(f"memory: {rate / 1e3:.0f} GB/s in a copy\n")
    results = []
    for shape, batch, context, nodes in measure.grid(
        measure.SHAPES, options.batch, options.context, options.nodes
    ):
        bench = measure.Bench(shape, batch, context, nodes, torch.bfloat16, device)
        results.append(bench.measure(flash, rate))
    print(measure.table(results))
    committed = measure_commits(options.batch, device)
    return {
        "errors": errors,
        "bytes_per_second": 1e6 * rate,
        "stock": f"vLLM's FlashAttention {flash.version}" if flash else None,
        "results": [result.as_json() for result in results],
        "commits": committed,
    }


def measure_commits(batches: Sequence[int], device: torch.device) -> list[dict[str, Any]]:
    """Time of committing what a step has accepted, all layers at once."""
    from vllm_ext.attention import measure

    layers, nodes = 32, 4
    found = []
    print(f"\ncommit of {nodes} nodes per request in {layers} layers, us (host, us):")
    for shape in measure.SHAPES:
        for batch in batches:
            run = measure.commit_call(shape, layers, batch, nodes, torch.bfloat16, device)
            timing, host = measure.timed(run), measure.queued(run)
            print(f"  {shape.name}, batch {batch}: {timing.median:.1f} ({host:.0f})")
            found.append(
                {"shape": shape.name, "batch": batch, "us": asdict(timing), "host_us": host}
            )
    return found


def measure_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of an engine step, trees of every size forced."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        config = options.config.read_text() if options.config else json.dumps(LLAMA_8B)
        (Path(folder) / "config.json").write_text(config)
        for nodes in options.nodes:
            results += engine_steps(folder, nodes, options)
    print(step_table(results))
    return {"results": results}


def engine_steps(model: str, nodes: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Start one engine and time it at every batch size."""
    from vllm import LLM, SamplingParams

    speculative = {"method": "dyspec", "num_speculative_tokens": nodes, "adaptive": False}
    engine = LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        speculative_config=speculative if nodes else None,
        max_model_len=options.context + options.tokens + 1,
        max_num_seqs=max(options.batch),
        enable_prefix_caching=False,
        disable_log_stats=False,
        enforce_eager=not torch.cuda.is_available(),  # compiling takes minutes on a CPU
    )
    params = SamplingParams(
        temperature=0.0, max_tokens=options.tokens, ignore_eos=True, detokenize=False
    )
    generator = torch.Generator().manual_seed(0)
    found = []
    for batch in (options.batch[0], *options.batch):  # the first once more: it warms up
        tokens = torch.randint(0, 1000, (batch, options.context), generator=generator)
        prompts: list[Any] = [{"prompt_token_ids": row.tolist()} for row in tokens]
        one = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
        begin = time.perf_counter()
        engine.generate(prompts, one, use_tqdm=False)
        prefill = time.perf_counter() - begin
        before = accepted_tokens(engine)
        begin = time.perf_counter()
        engine.generate(prompts, params, use_tqdm=False)
        decoding = time.perf_counter() - begin - prefill
        emitted = batch * (options.tokens - 1)
        accepted = accepted_tokens(engine) - before
        found.append(
            {
                "nodes": nodes,
                "batch": batch,
                "accepted_per_step": accepted / max(emitted - accepted, 1),
                "step_ms": step_milliseconds(decoding, emitted, accepted, batch),
            }
        )
    engine.llm_engine.engine_core.shutdown()
    return found[1:]


def accepted_tokens(engine: Any) -> int:
    """vLLM's counter of accepted draft tokens."""
    return sum(
        metric.value
        for metric in engine.get_metrics()
        if metric.name == "vllm:spec_decode_num_accepted_tokens"
    )


def step_milliseconds(seconds: float, emitted: int, accepted: int, batch: int) -> float:
    """Time of a step: each request emits its accepted tokens and one more per step."""
    return 1e3 * seconds * batch / max(emitted - accepted, 1)


def step_table(results: Sequence[dict[str, Any]]) -> str:
    """Step times as a Markdown table, with the step without drafts as the unit."""
    plain = {r["batch"]: r["step_ms"] for r in results if r["nodes"] == 0}
    lines = [
        "| batch | nodes | step, ms | over no draft | accepted per step |",
        "|---|---|---|---|---|",
    ]
    for r in sorted(results, key=lambda r: (r["batch"], r["nodes"])):
        over = f"{r['step_ms'] / plain[r['batch']]:.2f}" if r["batch"] in plain else "-"
        lines.append(
            f"| {r['batch']} | {r['nodes']} | {r['step_ms']:.2f} | {over} "
            f"| {r['accepted_per_step']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    if str(ROOT) not in sys.path:  # a checkout that is not installed
        sys.path.insert(0, str(ROOT))
    main()
