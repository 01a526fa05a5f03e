# SPDX-License-Identifier: Apache-2.0
"""Which draft models are refused before an engine starts, and how."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.vllm_ext.engine import make_tiny_model
from tests.vllm_ext.test_config import engine_args
from vllm_ext import draft_config
from vllm_ext.config import CONFIG_KEY, PLACEHOLDER_CLASS, draft_slots, translate
from vllm_ext.draft_config import check_draft, check_memory
from vllm_ext.draft_vocab import FILE, save
from vllm_ext.methods import METHODS, OptionError, parse_options


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("target"))


@pytest.fixture
def draft(target: Path, tmp_path: Path) -> Path:
    """A copy of the target, to be broken."""
    return Path(shutil.copytree(target, tmp_path / "draft"))


def model_config(target: Path) -> Any:
    from vllm.config import ModelConfig

    return ModelConfig(str(target), dtype="float32")


def check(target: Path, draft: object, **more: Any) -> None:
    sizes = {name: more.pop(name, 1) for name in ("tensor_parallel_size", "data_parallel_size")}
    options = parse_options(METHODS["dyspec"], {"model": str(draft), **more})
    check_draft(options, model_config(target), SimpleNamespace(**sizes), None)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_draft_model_is_accepted(target: Path, draft: Path) -> None:
    check(target, draft)
    check(target, draft, draft_dtype="bfloat16", max_model_len=32)
    # Files that differ in what does not matter to ids.
    path = draft / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "x"}))
    check(target, draft)


def test_a_path_that_is_nothing(target: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"no/such/model.*neither a folder nor"):
        check(target, "no/such/model")
    with pytest.raises(OptionError, match=r"no config\.json there"):
        check(target, tmp_path)


def test_missing_weights(target: Path, draft: Path) -> None:
    for file in draft.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(OptionError, match="no weights there"):
        check(target, draft)


def test_a_draft_vocabulary_that_cannot_be_used(target: Path, draft: Path) -> None:
    (draft / FILE).write_text("{}")
    with pytest.raises(OptionError, match=r"draft_vocab: .*is no draft vocabulary"):
        check(target, draft)
    check(target, draft, draft_vocab="off")
    with pytest.raises(OptionError, match=r"draft_vocab: no/such/file cannot be read"):
        check(target, draft, draft_vocab="no/such/file")
    save(draft / FILE, range(100))
    check(target, draft)


def test_another_tokenizer(target: Path, draft: Path) -> None:
    path = draft / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(content))
    with pytest.raises(OptionError, match=r"not the target's.*2 of the target's.*'a'.*same token"):
        check(target, draft)


def test_no_tokenizer(target: Path, draft: Path) -> None:
    for file in draft.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(OptionError, match="holds no tokenizer"):
        check(target, draft)


def test_not_a_model(target: Path, draft: Path) -> None:
    edit(draft, architectures=["NoSuchModel"], model_type="no_such_model")
    with pytest.raises(OptionError, match="vLLM cannot load it"):
        check(target, draft)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("is_hybrid", True, "recurrent layers"),
        ("is_attention_free", True, "recurrent layers"),
        ("is_encoder_decoder", True, "encoder-decoder"),
        ("uses_mrope", True, "M-RoPE"),
    ],
)
def test_models_whose_state_cannot_branch(
    target: Path, draft: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, message: str
) -> None:
    from vllm.config import ModelConfig

    given = model_config(target)
    monkeypatch.setattr(ModelConfig, name, value)
    options = parse_options(METHODS["dyspec"], {"model": str(draft)})
    with pytest.raises(OptionError, match=message):
        draft_config.draft_model_config(options, given)


def test_weights_larger_than_memory(
    target: Path, draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(file.stat().st_size for file in draft.glob("*.safetensors"))
    check_memory(draft, size)
    with pytest.raises(OptionError, match=r"GiB of memory are available; give a smaller"):
        check_memory(draft, size - 1)
    monkeypatch.setattr(draft_config, "_machine_memory", lambda: 1000)
    with pytest.raises(OptionError, match="GiB of memory are available"):
        check(target, draft)


def test_more_than_one_worker(target: Path, draft: Path) -> None:
    for name in ("tensor_parallel_size", "data_parallel_size"):
        with pytest.raises(OptionError, match=f"{name}=2"):
            check(target, draft, **{name: 2})
    with pytest.raises(OptionError, match="'draft_tensor_parallel_size' given as 2"):
        check(target, draft, draft_tensor_parallel_size=2)


def test_options_of_a_draft_model_without_one(target: Path) -> None:
    for given, message in (
        ({"quantization": "fp8"}, "quantization given without a draft model"),
        ({"max_model_len": 9, "draft_dtype": "float16"}, "max_model_len, draft_dtype given"),
        ({"draft_vocab": "off"}, "draft_vocab given without a draft model"),
        ({"verify": "kseq"}, r"verify='kseq' is a rule .* none is given: add 'model' or"),
        ({"sources": []}, r"sources=\[\] drafts nothing"),
    ):
        options = parse_options(METHODS["dyspec"], given)
        with pytest.raises(OptionError, match=message):
            check_draft(options, None, None, None)


def test_rules_of_verification(target: Path, draft: Path) -> None:
    for rule in ("match", "swor", "kseq", "block"):
        check(target, draft, verify=rule)
    for way in ("constant", "sequoia", "dyspec"):
        assert parse_options(METHODS["dyspec"], {"verify": "swor", "draw": way}).draw == way
        for rule in ("match", "kseq", "block"):
            with pytest.raises(OptionError, match=rf"'draw' given as '{way}'.*\"swor\""):
                parse_options(METHODS["dyspec"], {"verify": rule, "draw": way})
    with pytest.raises(OptionError, match=r"'verify' given as 'ratio'.*'swor'"):
        check(target, draft, verify="ratio")


def test_a_method_that_takes_no_draft_model() -> None:
    for name in set(METHODS) - {"dyspec", "rasd", "pearl", "datastore"}:
        with pytest.raises(
            OptionError, match=r"no draft model \(given model='x'\); these do: dyspec"
        ):
            parse_options(METHODS[name], {"model": "x"})


def test_the_flag_names_it_and_its_slots_are_reserved(target: Path, draft: Path) -> None:
    args = engine_args(None, spec_method="dyspec", spec_model=str(draft), spec_tokens=7)
    parallel = SimpleNamespace(
        worker_cls="auto",
        pipeline_parallel_size=1,
        tensor_parallel_size=1,
        data_parallel_size=1,
    )
    translate(args, model_config(target), parallel)
    assert args.spec_model is None
    assert args.additional_config[CONFIG_KEY]["options"]["model"] == str(draft)

    def slots(model: str, config: dict[str, Any]) -> int:
        speculative = SimpleNamespace(model=model)
        return draft_slots(
            SimpleNamespace(speculative_config=speculative, additional_config=config)
        )

    assert slots(PLACEHOLDER_CLASS, args.additional_config) == 8
    assert slots("another", {}) == 0
    plain = engine_args({"method": "dyspec"})
    translate(plain, model_config(target), parallel)
    assert slots(PLACEHOLDER_CLASS, plain.additional_config) == 0
    assert draft_slots(SimpleNamespace(speculative_config=None, additional_config=None)) == 0


def test_the_scheduler_is_told_of_the_slots() -> None:
    from vllm.config import VllmConfig

    from vllm_ext import plugin

    plugin.register()

    def never() -> bool:
        return False

    methods = ("use_dspark", "use_dflash", "use_eagle", "uses_draft_model")
    speculative = SimpleNamespace(model=PLACEHOLDER_CLASS, **dict.fromkeys(methods, never))
    read = VllmConfig.num_lookahead_tokens.fget
    for model, slots in (("x", 6), (None, 0)):
        options = {"model": model, "num_speculative_tokens": 5}
        config = SimpleNamespace(
            speculative_config=speculative, additional_config={CONFIG_KEY: {"options": options}}
        )
        assert read(config) == slots
