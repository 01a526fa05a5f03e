# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from proposers import Mixture, hydra_kernel
from proposers.hydra import KIND, HydraError, HydraHead
from proposers.hydra_kernel import HydraKernel
from proposers.hydra_source import HydraSource

VOCAB, KNOWN, HIDDEN, INNER = 50, 12, 8, 6
IDENTITY = {"model": "m1", "tokenizer": "t1"}


def made(seed: int = 0) -> HydraHead:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def exact(rows: int, columns: int) -> torch.Tensor:
        """A matrix that 8 bits hold as it is."""
        values = torch.randint(-127, 128, (rows, columns), generator=generator)
        values[:, 0] = 127
        return values / 64

    return HydraHead(
        tokens=torch.randperm(VOCAB, generator=generator)[:KNOWN],
        inner=exact(INNER, HIDDEN),
        inputs=drawn(VOCAB, INNER),
        outer=exact(HIDDEN, INNER),
        scale=torch.full((HIDDEN,), 0.5),
        gain=drawn(HIDDEN),
        outputs=exact(KNOWN + 1, HIDDEN),
        bias=drawn(KNOWN + 1),
    )


def expected(head: HydraHead, hidden: torch.Tensor, path: list[int], power: float) -> list[float]:
    """q after a path of tokens, by the equations of the module, one number at a time."""

    def norm(values: list[float]) -> list[float]:
        size = math.sqrt(sum(v * v for v in values) / len(values) + torch.finfo(torch.float32).eps)
        return [v / size for v in values]

    state = hidden.tolist()
    for token in path:
        normed = norm(state)
        mixed = [
            sum(head.inner[m, d].item() * normed[d] * head.scale[d].item() for d in range(HIDDEN))
            + head.inputs[token, m].item()
            for m in range(INNER)
        ]
        active = [x / (1 + math.exp(-x)) for x in mixed]
        moved = [
            normed[d] / 2 + sum(head.outer[d, m].item() * active[m] for m in range(INNER))
            for d in range(HIDDEN)
        ]
        state = [x * g for x, g in zip(norm(moved), head.gain.tolist(), strict=True)]
    logits = [
        power * (sum(o * s for o, s in zip(row.tolist(), state, strict=True)) + b.item())
        for row, b in zip(head.outputs, head.bias, strict=True)
    ]
    top = max(logits)
    total = sum(math.exp(x - top) for x in logits)
    return [math.exp(x - top) / total for x in logits]


def started(head: HydraHead, greedy: bool, *requests: str) -> HydraSource:
    source = HydraSource(head)
    for request in requests:
        source.start(request, [3, head.tokens[0].item()], greedy=greedy)
    return source


@pytest.mark.parametrize("greedy", [False, True])
def test_candidates_follow_the_equations_along_a_path(greedy: bool) -> None:
    head = made()
    known = head.tokens.tolist()
    source = started(head, greedy, "r")
    hidden = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(1))
    source.see(["r"], hidden)
    state, path = source.root("r"), [known[0]]
    undrafted = next(t for t in range(VOCAB) if t not in known)
    for token in (known[4], undrafted, None):
        bucket, found = source.candidates(state)
        q = expected(head, hidden[0], path, 1.5 if greedy else 1.0)
        likely = {known[i]: q[i] for i in range(KNOWN) if q[i] > 0.01}
        assert found == pytest.approx(likely, rel=1e-3)
        assert bucket == (2 if max(q[:-1]) >= 0.5 else 1)
        assert sum(found.values()) <= 1 + 1e-6
        if token is not None:
            state = source.advance(state, token)
            path.append(token)


def test_a_batch_is_answered_as_each_request_alone() -> None:
    head = made()
    hidden = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(2))
    names = ["a", "b", "c", "d", "e"]
    together = started(head, False, *names)
    together.see(names, hidden)
    for name, state in zip(names, hidden, strict=True):
        alone = started(head, False, name)
        alone.see([name], state[None])
        bucket, found = together.candidates(together.root(name))
        assert found == pytest.approx(alone.candidates(alone.root(name))[1], rel=1e-4)
        assert bucket in (1, 2)


def test_roots_of_a_batch_are_computed_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = HydraKernel.step

    def counted(self: HydraKernel, states: Any, tokens: list[int], powers: Any) -> Any:
        sizes.append(len(states))
        return original(self, states, tokens, powers)

    monkeypatch.setattr(HydraKernel, "step", counted)
    source = started(made(), False, "a", "b", "c")
    source.see(["a", "b", "c"], torch.ones(3, HIDDEN))
    assert not sizes  # a step without a draft costs nothing
    for name in ("b", "a", "c"):
        assert source.candidates(source.root(name))[1]
        source.candidates(source.root(name))
    assert sizes == [3]


def test_it_is_silent_where_it_knows_nothing() -> None:
    head = made()
    known = head.tokens.tolist()
    source = started(head, False, "r")
    assert source.candidates(source.root("r")) == (0, {})  # no state yet
    source.see(["r"], torch.ones(1, HIDDEN))
    state = source.root("r")
    assert source.candidates(state)[1]
    source.extend("r", [])
    assert source.candidates(source.root("r"))[1]
    source.extend("r", [known[1]])  # the state is no longer that of the newest token
    assert source.candidates(source.root("r")) == (0, {})
    source.stop("r")
    source.stop("r")
    assert source.candidates(source.root("r")) == (0, {})


def test_placeholders_and_empty_texts_are_no_error() -> None:
    source = HydraSource(made())
    source.start("empty", [], greedy=True)
    source.start("image", [10**6, -1], greedy=True)
    source.see(["empty", "image"], torch.ones(2, HIDDEN))
    for request in ("empty", "image"):
        assert source.candidates(source.root(request)) == (0, {})


def test_the_mixture_learns_what_it_is_worth() -> None:
    head = made()
    mixture = Mixture([started(head, False, "r")])
    source: Any = mixture.sources[0]
    source.see(["r"], torch.ones(1, HIDDEN))
    prediction = mixture.predict(mixture.root("r"), False)
    best = max(prediction.probs, key=prediction.probs.__getitem__)
    before = prediction.probs[best]
    for _ in range(50):
        mixture.learn(mixture.predict(mixture.root("r"), False), best)
    assert mixture.predict(mixture.root("r"), False).probs[best] > before
    absent = next(t for t in range(VOCAB) if t not in prediction.probs)
    for _ in range(400):
        mixture.learn(mixture.predict(mixture.root("r"), False), absent)
    assert mixture.predict(mixture.root("r"), False).probs[best] < before


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "new" / "h.safetensors"
    made().save(path, IDENTITY)
    return path


def test_round_trip(path: Path) -> None:
    loaded = HydraHead.load(path, IDENTITY, VOCAB, HIDDEN)
    for field in fields(HydraHead):
        assert torch.equal(getattr(loaded, field.name), getattr(made(), field.name))


def test_what_does_not_fit_is_refused(path: Path) -> None:
    for name in IDENTITY:
        with pytest.raises(HydraError, match=f"made for {name}.*run `vllm-ext head`"):
            HydraHead.load(path, {**IDENTITY, name: "other"}, VOCAB, HIDDEN)
    with pytest.raises(HydraError, match="has the shape"):
        HydraHead.load(path, IDENTITY, VOCAB, HIDDEN + 1)
    with pytest.raises(HydraError, match="inputs has the shape"):
        HydraHead.load(path, IDENTITY, VOCAB + 1, HIDDEN)
    with pytest.raises(HydraError, match="cannot be read"):
        HydraHead.load(path.parent / "absent", IDENTITY, VOCAB, HIDDEN)
    whole = path.read_bytes()
    for content, message in [
        (whole[:-3], "cannot be read"),
        (whole[:40], "not a file of `vllm-ext head`"),
        (b"", "claims 0 bytes"),
        (b"nonsense" * 100, "at most"),
    ]:
        path.write_bytes(content)
        with pytest.raises(HydraError, match=message):
            HydraHead.load(path, IDENTITY, VOCAB, HIDDEN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner": torch.full((INNER, HIDDEN), math.nan)}, "no finite numbers"),
        ({"bias": torch.zeros(KNOWN + 1, dtype=torch.int32)}, "no finite numbers"),
        ({"inputs": torch.zeros(VOCAB + 1, INNER)}, "has the shape"),
        ({"inner": torch.tensor(1.0)}, r"inner have the shapes \(12,\) and \(\)"),
        ({"inner": torch.zeros(0, HIDDEN)}, "inner have the shapes"),
        ({"tokens": torch.tensor(1)}, "tokens and inner have the shapes"),
        ({"tokens": torch.zeros(0, dtype=torch.int64)}, "has the shape"),
        ({"tokens": torch.zeros(KNOWN, dtype=torch.int64)}, "occurs twice"),
        ({"tokens": torch.arange(KNOWN) - 1}, "out of range"),
        ({"tokens": torch.arange(KNOWN, dtype=torch.int32)}, "out of range"),
    ],
)
def test_contents_are_checked(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "h"
    replace(made(), **change).save(path, IDENTITY)
    with pytest.raises(HydraError, match=message):
        HydraHead.load(path, IDENTITY, VOCAB, HIDDEN)


def test_another_files_tensors_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "h"
    save_file({"x": torch.zeros(2)}, path, metadata=KIND.metadata(IDENTITY))
    with pytest.raises(HydraError, match=r"holds \['x'\]"):
        HydraHead.load(path, IDENTITY, VOCAB, HIDDEN)


@pytest.mark.parametrize("compiles", [True, False])
def test_the_kernel_steps_as_the_network_does(
    compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiles:
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(hydra_kernel, "compiled", lambda: None)
    head = made()
    states = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(3))
    tokens, powers = [0, 7, 7, 49], torch.tensor([1.0, 2.0, 1.0, 0.5])
    kernel = HydraKernel(head)
    moved, logits, norms = map(
        torch.from_numpy, kernel.step(states.numpy(), tokens, powers.numpy())
    )
    expected = head.step(states, torch.tensor(tokens))
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)
    scaled = head.logits(expected) * powers[:, None]
    torch.testing.assert_close(logits, scaled, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norms, scaled.logsumexp(-1), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=f"size {HIDDEN + 1} for a head of size {HIDDEN}"):
        kernel.step(torch.ones(1, HIDDEN + 1).numpy(), [0], powers[:1].numpy())
