# SPDX-License-Identifier: Apache-2.0
"""The folder that a target's own layers are put into, and the targets that are refused."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.vllm_ext.engine import make_tiny_model
from tests.vllm_ext.test_config import engine_args
from vllm_ext import self_draft
from vllm_ext.config import CONFIG_KEY, read_options, translate
from vllm_ext.identity import tokenizer_hash
from vllm_ext.method_options import DySpecConfig
from vllm_ext.methods import OptionError
from vllm_ext.self_draft import INDEX, draft_folder, picked_layers

LAYERS = 4
TOKENS = torch.arange(3, 19)[None]


@pytest.fixture(scope="module")
def made_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("target"), num_hidden_layers=LAYERS)


def use_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not by the environment: vLLM keeps things in the same place, which take long to make.
    monkeypatch.setattr(self_draft, "cache_folder", lambda: folder)


@pytest.fixture
def target(made_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the target, to be changed, and a cache of its own."""
    use_cache(tmp_path / "cache", monkeypatch)
    return Path(shutil.copytree(made_target, tmp_path / "target"))


def config_of(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def draft(folder: Path, picked: list[int]) -> Path:
    return draft_folder(folder, config_of(folder), picked)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a target."""
    tensors = weights(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def in_cache() -> list[str]:
    """Folders in the cache, finished or not."""
    parent = self_draft.cache_folder() / "self_draft"
    return sorted(path.name for path in parent.glob("*") if path.is_dir())


# -- what is in the folder -------------------------------------------------------------------------


@pytest.mark.parametrize("picked", [[0], [0, 1, 2], [0, 2], [1, 3]])
def test_the_folder_holds_the_targets_tensors_bit_by_bit(target: Path, picked: list[int]) -> None:
    made = draft(target, picked)
    theirs, ours = weights(target), weights(made)
    around = {name for name in theirs if ".layers." not in name}
    assert around == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert len(ours) == len(around) + len(picked) * (len(theirs) - len(around)) // LAYERS
    for name, tensor in ours.items():
        if name not in around:
            _, _, number, rest = name.split(".", 3)
            name = f"model.layers.{picked[int(number)]}.{rest}"
        assert tensor.dtype == theirs[name].dtype
        assert bits(tensor) == bits(theirs[name])
    assert set(json.loads((made / INDEX).read_text())["weight_map"]) == set(ours)
    assert config_of(made).num_hidden_layers == len(picked)
    assert tokenizer_hash(made) == tokenizer_hash(target)
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in made.iterdir())


def test_the_folder_is_the_model_that_skips_layers(target: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_pretrained(draft(target, [0, 2]))
    skipping = AutoModelForCausalLM.from_pretrained(target)
    whole = skipping(TOKENS).logits
    skipping.model.layers = torch.nn.ModuleList(skipping.model.layers[i] for i in (0, 2))
    skipping.config.num_hidden_layers = 2
    expected = skipping(TOKENS, use_cache=False).logits
    torch.testing.assert_close(made(TOKENS, use_cache=False).logits, expected, rtol=0, atol=0)
    assert not torch.allclose(whole, expected)  # control: the others mattered


def test_half_precision_and_values_that_are_no_numbers_are_kept(target: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(torch.bfloat16)
        tensors["model.norm.weight"][:2] = torch.tensor([float("nan"), float("-inf")])

    edit(target, change)
    made = weights(draft(target, [0]))
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
    assert bits(made["model.norm.weight"]) == bits(weights(target)["model.norm.weight"])


def test_weights_in_several_files(target: Path) -> None:
    """An index says which count: the last one holds other names, as some publishers add."""
    tensors = weights(target)
    (target / "model.safetensors").unlink()
    half = len(tensors) // 2
    shards = [dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])]
    index = {}
    for number, shard in enumerate(shards):
        save_file(shard, target / f"part-{number}.safetensors")
        index |= dict.fromkeys(shard, f"part-{number}.safetensors")
    save_file({"layers.0.x": torch.ones(1)}, target / "consolidated.safetensors")
    (target / INDEX).write_text(json.dumps({"weight_map": index}))
    made = draft(target, [1, 2])
    assert sorted(file.name for file in made.glob("*.safetensors")) == [
        "part-0.safetensors",
        "part-1.safetensors",
    ]
    ours, written = weights(made), json.loads((made / INDEX).read_text())["weight_map"]
    name = "layers.{}.mlp.up_proj.weight"
    for new, old in enumerate((1, 2)):
        found = ours[f"model.{name.format(new)}"]
        torch.testing.assert_close(found, tensors[f"model.{name.format(old)}"], rtol=0, atol=0)
    for tensor, file in written.items():
        assert tensor in load_file(made / file)
    for file in set(written.values()):
        with safe_open(made / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}  # transformers wants to be told


def test_a_second_layout_of_the_same_weights(target: Path) -> None:
    expected = draft(target, [0])
    save_file({"layers.0.x": torch.ones(1)}, target / "consolidated.safetensors")
    made = draft(target, [0])
    assert made != expected
    assert set(weights(made)) == set(weights(expected))


def test_tied_embeddings_stay_tied(target: Path) -> None:
    edit(target, lambda tensors: tensors.pop("lm_head.weight"))
    configure(target, tie_word_embeddings=True)
    made = draft(target, [0, 1])
    assert "lm_head.weight" not in weights(made)
    assert config_of(made).tie_word_embeddings


def test_settings_per_layer_follow_their_layers(tmp_path: Path, monkeypatch: Any) -> None:
    from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

    use_cache(tmp_path / "cache", monkeypatch)
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
        sliding_window=4,
        eos_token_id=[1, 2, 3, 4, 5, 6],
    )
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    made = config_of(draft(tmp_path / "gemma", [0, 5]))
    assert made.layer_types == ["sliding_attention", "full_attention"]
    assert made.eos_token_id == [1, 2, 3, 4, 5, 6]
    loaded = AutoModelForCausalLM.from_pretrained(draft(tmp_path / "gemma", [0, 5]))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_another_naming_of_layers(tmp_path: Path, monkeypatch: Any) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    use_cache(tmp_path / "cache", monkeypatch)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2, n_positions=32)
    gpt = GPT2LMHeadModel(config).eval()
    gpt.save_pretrained(tmp_path / "gpt")
    made = AutoModelForCausalLM.from_pretrained(draft(tmp_path / "gpt", [0, 2])).eval()
    assert made.config.n_layer == 2
    del gpt.transformer.h[1]
    expected = gpt(TOKENS, use_cache=False).logits
    torch.testing.assert_close(made(TOKENS, use_cache=False).logits, expected, rtol=0, atol=0)


# -- the cache -------------------------------------------------------------------------------------


def test_a_folder_is_made_once_for_each_target_and_choice(target: Path, monkeypatch: Any) -> None:
    first = draft(target, [0, 2])
    others = [draft(target, [0, 1])]
    file = target / "tokenizer_config.json"
    before = file.read_text()
    file.write_text(before + " ")
    others.append(draft(target, [0, 2]))
    file.write_text(before)
    overridden = config_of(target)
    overridden.rms_norm_eps = 0.5
    others.append(draft_folder(target, overridden, [0, 2]))
    (target / "code.py").write_text("x = 1\n")
    others.append(draft(target, [0, 2]))
    assert (others[-1] / "code.py").read_text() == "x = 1\n"
    (target / "code.py").unlink()
    edit(target, lambda tensors: tensors["model.norm.weight"].mul_(2))
    others.append(draft(target, [0, 2]))
    edit(target, lambda tensors: tensors["model.norm.weight"].div_(2))
    assert len({first, *others}) == 6

    def never(*args: Any) -> None:
        raise AssertionError("written again")

    monkeypatch.setattr(self_draft, "_write", never)
    moved = target.rename(target.with_name("moved"))
    assert draft(moved, [0, 2]) == first
    with pytest.raises(AssertionError, match="written again"):  # control
        draft(moved, [1])


def test_a_failed_write_leaves_nothing(target: Path, monkeypatch: Any) -> None:
    write = self_draft._write

    def full(out: Path, *args: Any) -> None:
        write(out, *args)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(self_draft, "_write", full)
    with pytest.raises(OptionError, match=r"cannot be copied to .*self_draft.*No space left"):
        draft(target, [0])
    assert in_cache() == []


class Killed(BaseException):
    pass


def test_a_killed_process_leaves_no_broken_folder(target: Path, monkeypatch: Any) -> None:
    """All that happens before the end happens elsewhere, and is thrown away by the next one."""

    def killed(out: Path, *args: Any) -> None:
        assert in_cache() == [out.name]
        (out / "model.safetensors").write_bytes(b"half")
        dying.setattr("vllm_ext.self_draft.shutil.rmtree", lambda *args, **options: None)
        raise Killed

    with monkeypatch.context() as dying:
        dying.setattr(self_draft, "_write", killed)
        with pytest.raises(Killed):
            draft(target, [0])
    (left,) = in_cache()
    assert left.startswith(".making-")
    made = draft(target, [0])
    assert len(weights(made)) > 3
    assert in_cache() == [made.name]


def test_engines_that_start_at_once_write_it_once(target: Path, monkeypatch: Any) -> None:
    write, config = self_draft._write, config_of(target)
    begin, inside = threading.Barrier(3), threading.Barrier(3)
    written = []

    def counted(*args: Any) -> None:
        written.append(args)
        with contextlib.suppress(threading.BrokenBarrierError):
            inside.wait(0.5)  # for others, if they are let in
        write(*args)

    def start(_: int) -> Path:
        begin.wait()
        return draft_folder(target, config, [0])

    monkeypatch.setattr(self_draft, "_write", counted)
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(start, range(3)))
    assert len(written) == len(folders) == 1
    assert in_cache() == [folder.name for folder in folders]


# -- what is refused -------------------------------------------------------------------------------


def test_the_first_layers_and_lists_of_them() -> None:
    assert picked_layers(2, 4) == [0, 1]
    assert picked_layers([0, 2, 3], 4) == [0, 2, 3]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (0, "layers=0: the target has 4 layers .*give 1 to 3"),
        (4, "layers=4: the target has 4 layers .*must have fewer"),
        (-1, "give 1 to 3"),
        ([], r"layers=\[\]: give numbers"),
        ([0, 4], "from 0 to 3"),
        ([-1, 0], "from 0 to 3"),
        ([1, 1], "each once"),
        ([2, 0], "rising order"),
        ([0, 1, 2, 3], "all layers of the target"),
    ],
)
def test_layers_that_cannot_draft(layers: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        picked_layers(layers, LAYERS)


def with_odd_layer(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].clone()


def with_other_names(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("layers.", "layer_")] = tensors.pop(name)


def with_second_list(tensors: dict[str, torch.Tensor]) -> None:
    tensors["vision.blocks.0.weight"] = torch.ones(1)


def without_a_layer(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".layers.3." in name]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_odd_layer, r"layer 2 of the target is built otherwise than layer 1"),
        (with_other_names, "cannot be told from the names .*there are: none"),
        (with_second_list, r"there are: .*vision\.blocks\.\* \(1\)"),
        (without_a_layer, r"one list of 4 is expected.*model\.layers\.\* \(3\)"),
    ],
)
def test_weights_that_cannot_be_cut(target: Path, change: Any, message: str) -> None:
    edit(target, change)
    with pytest.raises(OptionError, match=message):
        draft(target, [0, 2])
    assert in_cache() == []


def test_layers_that_differ_may_be_left_early(target: Path) -> None:
    edit(target, with_odd_layer)
    assert draft(target, [0, 1]).is_dir()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "weights are quantized"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers=2: its layers depend on each other"),
        ({"num_hidden_layers": None}, "LlamaConfig has no num_hidden_layers: only plain decoders"),
    ],
)
def test_configurations_that_cannot_be_cut(
    target: Path, settings: dict[str, Any], message: str
) -> None:
    config = config_of(target)
    for name, value in settings.items():
        object.__setattr__(config, name, value)
    with pytest.raises(OptionError, match=message):
        resolve(target, config, 2)


def test_weights_that_are_not_there_or_cannot_be_read(target: Path) -> None:
    file = target / "model.safetensors"
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"nonsense" * 9):
        file.write_bytes(damaged)
        with pytest.raises(OptionError, match="its weights cannot be read"):
            draft(target, [0])
    file.rename(target / "pytorch_model.bin")
    with pytest.raises(OptionError, match="not safetensors"):
        draft(target, [0])
    for index in ("{}", "{", '{"weight_map": {"a": "absent"}}'):
        (target / INDEX).write_text(index)
        with pytest.raises(OptionError, match="its weights cannot be read"):
            draft(target, [0])
    (target / INDEX).unlink()
    (target / "pytorch_model.bin").unlink()
    with pytest.raises(OptionError, match=r"holds no weights.*download it first"):
        resolve(target, config_of(target), 1)
    assert in_cache() == []


def test_too_little_room(target: Path, monkeypatch: Any) -> None:
    made = draft(target, [0])
    size = sum(tensor.nbytes for tensor in weights(made).values())
    shutil.rmtree(made)
    free = [size - 1, size]
    monkeypatch.setattr(
        "vllm_ext.self_draft.shutil.disk_usage", lambda path: SimpleNamespace(free=free.pop(0))
    )
    with pytest.raises(OptionError, match=r"GiB are free in .*give fewer layers"):
        draft(target, [0])
    assert in_cache() == []
    assert draft(target, [0]) == made


# -- the method ------------------------------------------------------------------------------------


def resolve(target: Path, config: Any, layers: Any, workers: int = 1) -> DySpecConfig:
    options = self_draft.SelfDraftConfig(layers=layers)
    model = SimpleNamespace(model=str(target), revision=None, hf_config=config)
    parallel = SimpleNamespace(tensor_parallel_size=workers, data_parallel_size=1)
    return self_draft.as_dyspec(options, model, parallel, None)


def test_several_workers_are_refused_before_anything_is_written(target: Path) -> None:
    with pytest.raises(OptionError, match="tensor_parallel_size=2"):
        resolve(target, config_of(target), 1, workers=2)
    assert in_cache() == []


def test_the_engine_gets_dyspec_with_the_folder(target: Path) -> None:
    from vllm.config import ModelConfig

    parallel = SimpleNamespace(
        worker_cls="auto", pipeline_parallel_size=1, tensor_parallel_size=1, data_parallel_size=1
    )
    config = ModelConfig(str(target), dtype="float32")
    given = {"method": "self_draft", "layers": [0, 2], "sources": [], "draft_dtype": "bfloat16"}
    args = engine_args({**given, "num_speculative_tokens": 6})
    translate(args, config, parallel)
    carried = SimpleNamespace(additional_config=json.loads(json.dumps(args.additional_config)))
    name, options = read_options(carried)
    assert name == "dyspec"
    expected = DySpecConfig(
        model=str(draft(target, [0, 2])),
        sources=[],
        draft_dtype="bfloat16",
        num_speculative_tokens=6,
    )
    assert options == expected
    before = json.dumps(args.additional_config)
    translate(args, config, parallel)  # vLLM may build a configuration twice
    assert json.dumps(args.additional_config) == before
    assert CONFIG_KEY in args.additional_config
    with pytest.raises(OptionError, match=r"speculative method 'self_draft': layers=4"):
        translate(engine_args({"method": "self_draft", "layers": 4}), config, parallel)
