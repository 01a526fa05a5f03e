# SPDX-License-Identifier: Apache-2.0
"""A scripted engine, so that everything around real engines is tested without one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from vllm_ext.cli.engine_types import Completion, GenerateResult, RequestResult

Answer = Callable[[list[int], dict[str, Any]], RequestResult]


def request_of(
    *token_ids: list[int],
    text: str = "",
    finish: str = "length",
    logprobs: list[dict[int, float]] | None = None,
    prompt_logprobs: list[dict[int, float]] | None = None,
    first_token_s: float = 0.1,
    decode_s: float = 0.2,
) -> RequestResult:
    """A request with one sequence per list of token ids."""
    return RequestResult(
        [Completion(ids, finish, None, text, logprobs) for ids in token_ids],
        first_token_s,
        decode_s,
        prompt_logprobs,
    )


class FakeEngine:
    """Answers with `answer`; records what it was asked in `calls`."""

    def __init__(
        self,
        answer: Answer = lambda ids, params: request_of([1, 2, 3]),
        *,
        seconds_per_token: float = 0.05,
        drafted: int = 0,
        accepted: int = 0,
        drafting_share: float | None = None,
    ) -> None:
        self.answer = answer
        self.seconds_per_token = seconds_per_token
        self.drafted = drafted
        self.accepted = accepted
        self.drafting_share = drafting_share
        self.calls: list[tuple[list[list[int]], list[dict[str, Any]]]] = []
        self.restarts = 0
        self.closed = False
        self.paused = False

    def generate(
        self, prompts: Sequence[list[int]], params: Sequence[dict[str, Any]]
    ) -> GenerateResult:
        assert not self.paused
        self.calls.append((list(prompts), list(params)))
        requests = [self.answer(p, q) for p, q in zip(prompts, params, strict=True)]
        tokens = sum(r.num_tokens for r in requests)
        wall = tokens * self.seconds_per_token
        share = self.drafting_share
        return GenerateResult(
            requests,
            wall,
            self.drafted,
            self.accepted,
            request_steps=tokens - self.accepted,
            drafting_s=None if share is None else share * wall,
            engine_steps=None if share is None else tokens - self.accepted,
        )

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def wait(self) -> None:
        """It is ready at once."""

    def encode(self, rows: Sequence[Any], *, raw: bool) -> list[list[int]]:
        return [[index] for index in range(len(rows))]

    def restart(self) -> None:
        self.restarts += 1
        self.paused = False

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture(name="request_of")
def _request_of() -> Callable[..., RequestResult]:
    return request_of


@pytest.fixture(name="FakeEngine")
def _fake_engine() -> type[FakeEngine]:
    return FakeEngine


@pytest.fixture
def model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a model, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = tmp_path / "model"
    made.mkdir()
    (made / "model.safetensors").write_bytes(b"weights")
    (made / "tokenizer.json").write_text("{}")
    return made
