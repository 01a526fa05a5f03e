# SPDX-License-Identifier: Apache-2.0
"""Some of a target's own layers as its draft model.

LayerSkip (arXiv 2404.16710) drafts by leaving the target early, self-speculative decoding (Draft &
Verify, arXiv 2309.08168) by skipping some of its layers. With f_l the l-th layer and z the chosen
ones,

    x_(l+1) = x_l + f_l(x_l)  for l in z,  x_(l+1) = x_l  otherwise,

and the target's own norm and output layer read what comes out. That is a model of the target's
architecture with fewer layers, so it is made one, before the engine starts: a folder in the user's
cache with the chosen layers renumbered and all that is around them, byte by byte the target's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from vllm_ext.draft_config import check_one_worker
from vllm_ext.identity import (
    TOKENIZER_FILES,
    IdentityError,
    cache_folder,
    local_folder,
    model_hash,
)
from vllm_ext.method_options import DySpecConfig, SelfDraftConfig
from vllm_ext.methods import OptionError

logger = logging.getLogger("vllm.vllm_ext")

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FORMAT = "1"  # of the folders: another one is made anew
_ENTANGLED = ("num_kv_shared_layers", "hidden_size_per_layer_input")
_QUANTIZED = ("quantization_config", "compression_config")


def as_dyspec(
    options: SelfDraftConfig, model_config: Any, parallel_config: Any, download_dir: str | None
) -> DySpecConfig:
    """The same method as dyspec with a draft model; that model is made unless it is there.

    Args:
        options: of the method.
        model_config: the target's ``ModelConfig``.
        parallel_config: vLLM's ``ParallelConfig``.
        download_dir: of the engine.

    Raises:
        OptionError: the layers are none of the target's, it cannot be cut, or its layers cannot be
            written.
    """
    check_one_worker(parallel_config)
    try:
        target = local_folder(model_config.model, model_config.revision, download_dir)
        picked = picked_layers(options.layers, _layer_count(model_config.hf_config))
        folder = draft_folder(target, model_config.hf_config, picked)
    except IdentityError as error:
        raise OptionError(
            f"{error}. Its layers are read before the engine starts: download it first, for "
            "example with `hf download`"
        ) from error
    logger.info("vllm-ext: self_draft: layers %s of %s are in %s", picked, target, folder)
    return DySpecConfig(model=str(folder), **options.model_dump(exclude={"layers"}))


def picked_layers(layers: int | Sequence[int], total: int) -> list[int]:
    """The numbers of the layers that draft.

    Args:
        layers: how many of the first, or the numbers.
        total: layers of the target.

    Raises:
        OptionError: they are not in order, not all the target's, or all of the target.
    """
    if isinstance(layers, int):
        if not 1 <= layers < total:
            raise OptionError(
                f"layers={layers}: the target has {total} layers and the draft must have fewer; "
                f"give 1 to {total - 1}, or a list"
            )
        return list(range(layers))
    picked = list(layers)
    if not picked or picked != sorted(set(picked)) or picked[0] < 0 or picked[-1] >= total:
        raise OptionError(
            f"layers={picked}: give numbers of the target's layers, from 0 to {total - 1}, each "
            "once and in rising order"
        )
    if len(picked) == total:
        raise OptionError(
            f"layers={picked}: these are all layers of the target, which cannot pay; leave some out"
        )
    return picked


def draft_folder(target: Path, config: Any, picked: Sequence[int]) -> Path:
    """The folder of the model that has the layers `picked` of a target.

    It lies in the user's cache and is made only once, as a whole or not at all: engines that start
    at the same time wait for the first.

    Args:
        target: its folder, with weights in safetensors.
        config: its transformers configuration, as vLLM has read it.
        picked: numbers of layers, as `picked_layers` gives them.

    Raises:
        OptionError: the target cannot be cut, or the folder cannot be written.
        IdentityError: the target has no weights there.
    """
    from filelock import FileLock

    made = _smaller_config(config, picked)
    folder = cache_folder() / "self_draft" / _key(target, made, picked)
    if folder.is_dir():
        return folder
    with _refusing(f"{target}: its weights cannot be read"):
        weights = _picked_weights(list(_stored(target)), picked, config.num_hidden_layers)
    with _refusing(f"the layers of {target} cannot be copied to {folder.parent}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():
                _make(folder, target, made, weights)
    return folder


class _Stored(NamedTuple):
    """A tensor in a file of the target; `size` in bytes."""

    file: Path
    name: str
    shape: tuple[int, ...]
    size: int


class _Weight(NamedTuple):
    """A tensor of the draft: the target's, and its name in the draft."""

    stored: _Stored
    name: str


def _layer_count(config: Any) -> int:
    total = getattr(config, "num_hidden_layers", None)
    if not isinstance(total, int):
        raise OptionError(
            f"{type(config).__name__} has no num_hidden_layers: only plain decoders can draft with "
            "some of their layers; use dyspec"
        )
    return total


def _smaller_config(config: Any, picked: Sequence[int]) -> Any:
    """The target's configuration for the layers `picked`."""
    from vllm_ext.distill.student import student_config

    for name in _ENTANGLED:
        if getattr(config, name, None):
            raise OptionError(
                f"{type(config).__name__} has {name}={getattr(config, name)}: its layers depend "
                "on each other, and some of them alone are no model; use dyspec"
            )
    for name in _QUANTIZED:
        if getattr(config, name, None):
            raise OptionError(
                "the target's weights are quantized, and settings of quantization name layers by "
                "their place; use dyspec, with a draft model of its own if wanted"
            )
    return student_config(config, picked)


def _key(target: Path, made: Any, picked: Sequence[int]) -> str:
    """32 hex digits for all that the folder depends on."""
    settings = json.loads(made.to_json_string())
    settings.pop("transformers_version", None)  # of the writer
    content = [_FORMAT, model_hash(target), json.dumps(settings, sort_keys=True), str(list(picked))]
    digest = hashlib.blake2b(digest_size=16)
    for part in (*map(str.encode, content), *(file.read_bytes() for file in _companions(target))):
        digest.update(hashlib.blake2b(part).digest())
    return digest.hexdigest()


def _companions(target: Path) -> list[Path]:
    """Files that go into the draft's folder as they are: tokenizer, and code of the model."""
    tokenizer = [target / name for name in TOKENIZER_FILES]
    return [file for file in (*tokenizer, *sorted(target.glob("*.py"))) if file.is_file()]


def _stored(target: Path) -> Iterator[_Stored]:
    """All tensors of the target; their values are not read."""
    from safetensors import safe_open

    for file in _weight_files(target):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                tensor = opened.get_tensor(name)
                yield _Stored(file, name, tuple(tensor.shape), tensor.nbytes)


def _weight_files(target: Path) -> list[Path]:
    """Those that vLLM loads; a folder may hold the weights in a second layout besides."""
    if (target / INDEX).is_file():
        named = json.loads((target / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return [target / name for name in sorted(set(named.values()))]
    files = sorted(target.glob("*.safetensors"))
    if not files:
        raise OptionError(f"{target}: its weights are not safetensors; convert them, or use dyspec")
    return [target / _SINGLE] if target / _SINGLE in files else files


def _picked_weights(stored: Sequence[_Stored], picked: Sequence[int], total: int) -> list[_Weight]:
    """What goes into the draft, under its new names.

    Raises:
        OptionError: which tensors belong to which layer cannot be told from their names, or the
            layers differ where they must not.
    """
    places = [_place(tensor.name) for tensor in stored]
    found: dict[str, set[int]] = {}
    for numbered in filter(None, places):
        found.setdefault(numbered.prefix, set()).add(numbered.number)
    if list(found.values()) != [set(range(total))]:
        lists = ", ".join(f"{prefix}.* ({len(numbers)})" for prefix, numbers in found.items())
        raise OptionError(
            f"the target's layers cannot be told from the names of its tensors: one list of "
            f"{total} is expected, such as model.layers.*, and there are: {lists or 'none'}; use "
            "dyspec"
        )
    shapes: list[dict[str, tuple[int, ...]]] = [{} for _ in range(total)]
    weights = []
    for tensor, place in zip(stored, places, strict=True):
        if place is None:
            weights.append(_Weight(tensor, tensor.name))
            continue
        shapes[place.number][place.rest] = tensor.shape
        if place.number in picked:
            new = picked.index(place.number)
            weights.append(_Weight(tensor, f"{place.prefix}.{new}.{place.rest}"))
    for new, old in enumerate(picked):
        # What a configuration says of a layer by its place must hold for the one that takes it.
        if shapes[new] != shapes[old]:
            raise OptionError(
                f"layer {old} of the target is built otherwise than layer {new}, whose place it "
                "would take; give the first layers only"
            )
    return weights


class _Place(NamedTuple):
    prefix: str
    number: int
    rest: str


def _place(name: str) -> _Place | None:
    """Where the first number in a tensor's name puts it."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts[:-1]) if part.isdecimal()), None)
    if at is None:
        return None
    return _Place(".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :]))


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if size > free:
        raise OptionError(
            f"the layers take {size / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free in "
            f"{folder.parent}: make room, give fewer layers, or set XDG_CACHE_HOME"
        )


def _make(folder: Path, target: Path, config: Any, weights: Sequence[_Weight]) -> None:
    """Write the folder elsewhere and put it in its place."""
    scratch = folder.with_name(f".making-{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    _check_space(folder, sum(weight.stored.size for weight in weights))
    try:
        scratch.mkdir()
        _write(scratch, target, config, weights)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(out: Path, target: Path, config: Any, weights: Iterable[_Weight]) -> None:
    """Fill the folder; one file for each of the target's, whose tensors are mapped, not loaded."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    by_file: dict[Path, list[_Weight]] = {}
    for weight in weights:
        by_file.setdefault(weight.stored.file, []).append(weight)
    for file, held in by_file.items():
        with safe_open(file, framework="pt") as opened:
            tensors = {weight.name: opened.get_tensor(weight.stored.name) for weight in held}
            save_file(tensors, out / file.name, metadata=opened.metadata() or {"format": "pt"})
    index = {weight.name: file.name for file, held in by_file.items() for weight in held}
    (out / INDEX).write_text(json.dumps({"weight_map": index}, indent=1), encoding="utf-8")
    config.save_pretrained(out)
    for file in _companions(target):
        shutil.copyfile(file, out / file.name)
    for file in out.iterdir():
        file.chmod(0o644)  # safetensors writes 0600: other users of a shared cache could not read


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Make errors of files one line that begins with `what`."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, json.JSONDecodeError, KeyError) as error:
        raise OptionError(f"{what}: {error}") from error
