# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm_ext.engine import make_engine, texts
from vllm_ext.distill.student import make_student, save_student


@pytest.mark.engine
def test_vllm_loads_a_draft_and_says_what_transformers_says(
    target: Any, target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import SamplingParams

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    student = make_student(target, [0, 2])
    save_student(student, target_folder, tmp_path, torch.float32)
    prompt = [5, 6, 7, 8]
    wanted = list(prompt)
    with torch.inference_mode():
        for _ in range(12):
            wanted.append(int(student(torch.tensor([wanted])).logits[0, -1].argmax()))
    engine = make_engine(tmp_path, None)
    try:
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        found = texts(engine, [{"prompt_token_ids": prompt}], params)
    finally:
        engine.llm_engine.engine_core.shutdown()
    assert found == [[wanted[len(prompt) :]]]
