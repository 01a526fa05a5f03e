# SPDX-License-Identifier: Apache-2.0
"""Engines on a tiny random model, for tests that need the whole of vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SPECIAL = ("<s>", "</s>")
VOCAB = 256 + len(SPECIAL)  # one token per byte
MAX_LEN = 256


def make_tiny_model(folder: Path, max_len: int = MAX_LEN, seed: int = 1, **shape: int) -> Path:
    """Save a random three-layer Llama over bytes, with its tokenizer; it repeats itself soon.

    `shape` replaces values of its `LlamaConfig`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        chat_template="{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
    ).save_pretrained(folder)

    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
    config = LlamaConfig(
        vocab_size=VOCAB,
        **{**sizes, **shape},
        max_position_embeddings=max_len,
        initializer_range=0.35,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_engine(model: Path, speculative: dict[str, Any] | None, **options: Any) -> Any:
    """An offline engine with small, awkward limits: chunked prompts and mixed batches."""
    from vllm import LLM

    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": MAX_LEN,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 96,
        "block_size": 32,
        "seed": 0,
        "disable_log_stats": False,
    }
    return LLM(str(model), speculative_config=speculative, **{**defaults, **options})


def prompts(count: int, seed: int = 0, longest: int = 60) -> list[dict[str, list[int]]]:
    """Random prompts of different lengths; some longer than a step's token budget allows."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(3, longest, (1,), generator=generator))
        tokens = torch.randint(2, VOCAB, (length,), generator=generator)
        made.append({"prompt_token_ids": tokens.tolist()})
    return made


def texts(engine: Any, requests: list[Any], params: Any) -> list[list[list[int]]]:
    """Token ids of every sample of every request."""
    outputs = engine.generate(requests, params, use_tqdm=False)
    return [[list(sample.token_ids) for sample in output.outputs] for output in outputs]


def spec_metrics(engine: Any) -> dict[str, int]:
    """vLLM's own speculation counters."""
    return {
        metric.name.removeprefix("vllm:spec_decode_"): metric.value
        for metric in engine.get_metrics()
        if metric.name.startswith("vllm:spec_decode_") and hasattr(metric, "value")
    }


def make_adapter(model: Path, folder: Path) -> Path:
    """Save a random LoRA adapter for the tiny model, strong enough to change its text."""
    import json

    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    rank, generator = 4, torch.Generator().manual_seed(2)
    tensors = {}
    for name, module in AutoModelForCausalLM.from_pretrained(model).named_modules():
        if name.endswith(("q_proj", "v_proj")):
            for side, shape in (
                ("A", (rank, module.in_features)),
                ("B", (module.out_features, rank)),
            ):
                tensors[f"base_model.model.{name}.lora_{side}.weight"] = torch.randn(
                    shape, generator=generator
                )
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
