# SPDX-License-Identifier: Apache-2.0
"""Can this draft model draft for this target? Asked before any engine process starts.

A draft model proposes token ids, so its tokenizer must be the target's; its keys and values lie in
the target's blocks, so it must be a plain decoder; and it has to fit beside the target.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_ext import draft_vocab as vocab_file
from vllm_ext.identity import IdentityError, local_folder, tokenizer_hash
from vllm_ext.methods import OptionError

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


def check_draft(
    options: Any, model_config: Any, parallel_config: Any, download_dir: str | None
) -> None:
    """Refuse a draft model that cannot be used.

    Args:
        options: of the method; those of a method without draft models pass.
        model_config: the target's ``ModelConfig``.
        parallel_config: vLLM's ``ParallelConfig``.
        download_dir: of the engine.

    Raises:
        OptionError: what was given, what is needed, what to do.
    """
    if getattr(options, "model", None) is None:
        given = [name for name in _DEPENDENT if getattr(options, name, None) is not None]
        if given:
            raise OptionError(f"{', '.join(given)} given without a draft model: add 'model'")
        verify = getattr(options, "verify", "match")
        if verify != "match":
            raise OptionError(
                f"verify={verify!r} is a rule for drafts drawn from a draft model, and none is "
                "given: add 'model' or use verify='match'"
            )
        if getattr(options, "sources", None) == []:
            raise OptionError("sources=[] drafts nothing without a draft model: add 'model'")
        return
    check_one_worker(parallel_config)
    try:
        folder = local_folder(options.model, None, download_dir)
        target = local_folder(model_config.model, model_config.revision, download_dir)
        _check_files(folder)
        _check_tokenizer(folder, target, model_config)
    except IdentityError as error:
        raise OptionError(f"draft model: {error}") from error
    check_memory(folder, _machine_memory())
    draft_vocab(options, draft_model_config(options, model_config), folder)


_DEPENDENT = ("quantization", "max_model_len", "draft_dtype", "draft_vocab")


def check_one_worker(parallel_config: Any) -> None:
    """Refuse a draft model on several workers.

    Raises:
        OptionError: with what is to be 1.
    """
    for name in ("tensor_parallel_size", "data_parallel_size"):
        size = getattr(parallel_config, name)
        if size > 1:
            raise OptionError(
                f"draft model with {name}={size}: draft models run on one worker only; use "
                f"{name}=1 or a method without one"
            )


def draft_model_config(options: Any, model_config: Any) -> Any:
    """The draft's vLLM ``ModelConfig``.

    Args:
        options: with a draft model.
        model_config: the target's.

    Raises:
        OptionError: vLLM cannot load it, or its layers cannot draft trees.
    """
    from vllm.config import ModelConfig

    try:
        config = ModelConfig(
            model=options.model,
            runner="draft",
            tokenizer=model_config.tokenizer,
            tokenizer_mode=model_config.tokenizer_mode,
            trust_remote_code=model_config.trust_remote_code,
            dtype=options.draft_dtype or model_config.dtype,
            seed=model_config.seed,
            max_model_len=options.max_model_len,
            spec_target_max_model_len=model_config.max_model_len,
            quantization=options.quantization,
            enforce_eager=model_config.enforce_eager,
            config_format=model_config.config_format,
        )
    except (ValueError, OSError) as error:  # pydantic's errors are ValueErrors
        raise OptionError(f"draft model {options.model!r}: vLLM cannot load it: {error}") from error
    problems = []
    if config.is_hybrid or config.is_attention_free:
        problems.append("it has recurrent layers, whose state cannot branch")
    if config.is_encoder_decoder:
        problems.append("it is an encoder-decoder model")
    if config.uses_mrope:
        problems.append("its positions are M-RoPE")
    if problems:
        raise OptionError(
            f"draft model {options.model!r}: {'; '.join(problems)}. Give a decoder-only model with "
            "attention layers"
        )
    return config


def draft_vocab(options: Any, config: Any, folder: Path) -> list[int] | None:
    """The tokens that a draft model may draft, or ``None`` for all.

    Args:
        options: with a draft model.
        config: the draft's ``ModelConfig``.
        folder: of the draft model.

    Raises:
        OptionError: the file cannot be used.
    """
    path = vocab_file.path_of(options.draft_vocab, folder)
    if path is None:
        return None
    try:
        return vocab_file.load(path, int(config.get_vocab_size()))
    except vocab_file.DraftVocabError as error:
        raise OptionError(f"draft model {options.model!r}, draft_vocab: {error}") from error


def check_memory(folder: Path, available: int) -> None:
    """Refuse weights that do not fit.

    Args:
        folder: of the draft model.
        available: bytes.

    Raises:
        OptionError: with both sizes.
    """
    size = sum(file.stat().st_size for file in _weights(folder))
    if size > available:
        raise OptionError(
            f"draft model {folder}: its weights take {size / 2**30:.2f} GiB and "
            f"{available / 2**30:.2f} GiB of memory are available; give a smaller draft model"
        )


def _machine_memory() -> int:
    import psutil
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return int(psutil.virtual_memory().available)
    return int(current_platform.get_device_total_memory())


def _weights(folder: Path) -> list[Path]:
    # A folder may hold its weights in several formats, of which one is loaded.
    formats = [sorted(folder.glob(pattern)) for pattern in _WEIGHTS]
    return next((files for files in formats if files), [])


def _check_files(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise OptionError(f"draft model {folder}: no config.json there; give a model's folder")
    if not _weights(folder):
        raise OptionError(
            f"draft model {folder}: no weights there ({', '.join(_WEIGHTS)}); give a model's folder"
        )


def _check_tokenizer(draft: Path, target: Path, model_config: Any) -> None:
    """Equal files, or equal maps from tokens to ids: other differences do not matter to ids."""
    if tokenizer_hash(draft) == tokenizer_hash(target):
        return
    from vllm.tokenizers import get_tokenizer

    trust = model_config.trust_remote_code
    try:
        ours, theirs = (
            get_tokenizer(str(folder), trust_remote_code=trust).get_vocab()
            for folder in (draft, target)
        )
    except (ValueError, OSError) as error:
        raise OptionError(f"draft model {draft}: its tokenizer cannot be read: {error}") from error
    if ours != theirs:
        differing = [t for t in theirs if ours.get(t) != theirs[t]]
        example = f", for example {min(differing)!r}" if differing else ""
        raise OptionError(
            f"draft model {draft}: its tokenizer is not the target's: {len(ours)} tokens against "
            f"{len(theirs)}, {len(differing)} of the target's have another id or none{example}. "
            "Give a draft model with the same tokenizer"
        )
