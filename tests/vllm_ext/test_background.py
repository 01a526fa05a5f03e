# SPDX-License-Identifier: Apache-2.0
"""Priming in the background, on a stand-in for vLLM's engine client."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from proposers.prime import PrimeTable
from tests.vllm_ext.server import Server
from vllm_ext import background, prime
from vllm_ext.config import CONFIG_KEY, PLACEHOLDER_CLASS

IDENTITY = {"model": "m", "tokenizer": "t"}
VOCAB = 40


class Engine:
    """Says that token + 1 follows; busy for a while with somebody else's request."""

    def __init__(self, option: str = "background", busy: int = 0) -> None:
        self.vllm_config = SimpleNamespace(
            speculative_config=SimpleNamespace(model=PLACEHOLDER_CLASS),
            additional_config={CONFIG_KEY: {"method": "dyspec", "options": {"prime": option}}},
            model_config=SimpleNamespace(
                model="m", revision=None, get_vocab_size=lambda: VOCAB, max_logprobs=20
            ),
            load_config=SimpleNamespace(download_dir=None),
        )
        self.busy = busy
        self.running = 0
        self.most_running = 0
        self.asked: list[list[int]] = []
        self.asked_while_busy = 0

    def get_tokenizer(self) -> Any:
        return SimpleNamespace(
            eos_token="e", bos_token=None, unk_token_id=0, convert_tokens_to_ids={"e": 7}.get
        )

    def get_num_unfinished_requests(self) -> int:
        self.busy -= self.busy > 0
        return self.running + self.busy

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        self.asked_while_busy += self.busy > 0
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.asked.append(prompt["prompt_token_ids"])
        await asyncio.sleep(0)
        self.running -= 1
        following = (prompt["prompt_token_ids"][1] + 1) % VOCAB
        answer = {following: SimpleNamespace(logprob=-0.1), 0: SimpleNamespace(logprob=-3.0)}
        yield SimpleNamespace(outputs=[SimpleNamespace(logprobs=[answer])])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(background, "local_folder", lambda *_: Path("m"))
    monkeypatch.setattr(background, "identity_of", lambda _: IDENTITY)
    monkeypatch.setattr(background, "_LOOK_SECONDS", 0.0)
    return prime.TABLES.path(IDENTITY)


def run(engine: Engine) -> bool:
    """Whether there was anything to do."""

    async def serve() -> bool:
        task = background.start(engine)
        if task is not None:
            await task
        return task is not None

    return asyncio.run(serve())


def test_the_table_is_made_while_the_server_is_idle(cache: Path) -> None:
    engine = Engine(busy=5)
    assert run(engine)
    assert engine.asked == [[7, token] for token in range(VOCAB)]
    assert engine.asked_while_busy == 0
    assert engine.most_running <= 16
    table = PrimeTable.load(cache, IDENTITY, VOCAB)
    assert table.ids[3, 0] == 4
    assert table.probs[3, 0] == pytest.approx(0.9048, abs=1e-3)


def test_a_table_that_exists_is_not_made_again(cache: Path) -> None:
    run(Engine())
    again = Engine()
    run(again)
    assert not again.asked


@pytest.mark.parametrize("option", ["auto", "off"])
def test_only_when_asked(option: str, cache: Path) -> None:
    assert not run(Engine(option))
    assert not cache.exists()


def test_a_server_of_others() -> None:
    engine = Engine()
    engine.vllm_config.speculative_config = None
    assert not run(engine)
    assert background.start(None) is None


def test_failures_are_told_and_do_no_harm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cache: Path
) -> None:
    engine = Engine()

    async def broken(*_: Any) -> AsyncIterator[Any]:
        raise RuntimeError("the engine is gone")
        yield

    monkeypatch.setattr(engine, "generate", broken)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.ERROR, logger="vllm.vllm_ext"):
        assert run(engine)
    assert "priming in the background failed" in caplog.text
    assert not cache.exists()


@pytest.mark.engine
def test_a_real_server_primes_itself(server: Server) -> None:
    [path] = (server.folder / "vllm-ext" / "prime").glob("*.safetensors")
    assert path.stat().st_size > 1000
    assert server.complete(prompt="abc")["choices"]
