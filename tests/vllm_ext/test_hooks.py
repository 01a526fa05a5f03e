# SPDX-License-Identifier: Apache-2.0
"""Drift: every symbol we touch, and the code around it that we rely on, in the installed vLLM."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace

import pytest

from vllm_ext import hooks


@pytest.mark.parametrize("hook", hooks.ALL, ids=lambda hook: hook.name)
def test_hook_is_in_place(hook: hooks.Hook) -> None:
    report = hooks.check_one(hook)
    assert report.ok, report.reason
    assert hook.why
    assert hook.remove_when


def test_names_are_unique() -> None:
    assert len({hook.name for hook in hooks.ALL}) == len(hooks.ALL)


def test_a_missing_symbol_is_refused_by_name() -> None:
    gone = replace(hooks.ALL[0], target="vllm.engine.arg_utils:EngineArgs.no_such_method")
    assert not hooks.check_one(gone).ok
    with pytest.raises(hooks.HookError, match="no_such_method"):
        hooks.require((hooks.ALL[1], gone))


def test_a_changed_signature_is_refused_by_name() -> None:
    changed = replace(hooks.ALL[0], parameters=("self", "another_argument"))
    with pytest.raises(hooks.HookError, match="another_argument"):
        hooks.require((changed,))


def test_a_missing_module_is_refused_by_name() -> None:
    gone = replace(hooks.ALL[0], target="vllm.no_such_module:thing")
    with pytest.raises(hooks.HookError, match="no_such_module"):
        hooks.require((gone,))


def source(target: str) -> str:
    return inspect.getsource(hooks.resolve(target))


RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"

ANCHORS = [
    # Positions are final only after the slots were computed from them: rewriting them afterwards
    # moves positions and leaves slots alone.
    (f"{RUNNER}._prepare_inputs", "block_table.compute_slot_mapping("),
    (f"{RUNNER}._prepare_inputs", "self.positions[:total_num_scheduled_tokens]"),
    # The root's row comes first among a request's logits.
    (f"{RUNNER}._calc_spec_decode_metadata", "logits_indices"),
    # Drafting runs after bookkeeping for custom classes, on lists of tokens.
    (f"{RUNNER}.sample_tokens", "draft_after_bookkeeping = True"),
    (f"{RUNNER}.sample_tokens", "propose_draft_token_ids(valid_sampled_token_ids)"),
    (f"{RUNNER}.sample_tokens", "sampler_output = self._sample(logits, spec_decode_metadata)"),
    # A step without drafts is sampled by vLLM's own sampler, which sees no drafts then; and what is
    # not told to the scheduler leaves a request without drafts, once those that it had were used.
    (f"{RUNNER}._sample", "if spec_decode_metadata is None:"),
    (
        "vllm.v1.worker.gpu_input_batch:InputBatch.update_req_spec_token_ids",
        "cur_spec_token_ids.clear()",
    ),
    ("vllm.v1.core.sched.scheduler:Scheduler.schedule", "request.spec_token_ids = []"),
    # Ragged lists of drafts are passed through.
    (f"{RUNNER}._get_draft_token_ids_cpu", "isinstance(self._draft_token_ids, list)"),
    # After each step the engine asks its executor for drafts, which came with the step's output.
    ("vllm.v1.engine.core:EngineCore.step", "self.model_executor.sample_tokens(grammar_output)"),
    ("vllm.v1.engine.core:EngineCore.post_step", "self.model_executor.take_draft_token_ids()"),
    # Bookkeeping extends the live output list by what we return.
    (f"{RUNNER}._bookkeeping_sync", "req_state.output_token_ids.extend(sampled_ids)"),
    # The CPU worker looks its runner class up in its own module.
    ("vllm.v1.worker.cpu_worker:CPUWorker.init_device", "CPUModelRunner(self.vllm_config"),
    # The scheduler truncates drafts from the end, and counts rejections from what came back.
    (
        "vllm.v1.core.sched.scheduler:Scheduler.schedule",
        "spec_token_ids = spec_token_ids[:num_scheduled_spec_tokens]",
    ),
    (
        "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        "num_rejected = num_draft_tokens - num_accepted",
    ),
    # custom_class selects Model Runner V1.
    (
        "vllm.config.vllm:VllmConfig._get_v2_model_runner_unsupported_features",
        '"custom_class"',
    ),
    # worker_cls is replaced only while it is "auto".
    ("vllm.platforms.cpu:CpuPlatform.check_and_update_config", 'worker_cls == "auto"'),
    # On CUDA: graphs are chosen after the step's trees are known, before metadata is built; the GPU
    # worker imports its runner class when it needs it; attention metadata is built per layer name.
    (f"{RUNNER}.execute_model", ") = self._determine_batch_execution_and_padding("),
    (f"{RUNNER}._determine_batch_execution_and_padding", "force_uniform_decode=force_uniform"),
    (
        "vllm.v1.worker.gpu_worker:Worker",
        "from vllm.v1.worker.gpu_model_runner import GPUModelRunner as GPUModelRunnerV1",
    ),
    (f"{RUNNER}._build_attention_metadata", ".get_device_tensor(num_reqs_padded)"),
    # The walk on the device draws as the sampler does on a GPU: softmax over exponential noise, one
    # row of it per request, from the request's own generator.
    (
        "vllm.v1.sample.ops.topk_topp_sampler:TopKTopPSampler.forward_native",
        "logits.softmax(dim=-1",
    ),
    ("vllm.v1.sample.ops.topk_topp_sampler:random_sample", "q[i].exponential_(generator=gen"),
    ("vllm.v1.sample.ops.topk_topp_sampler:random_sample", "if len(generators) != probs.shape[0]:"),
    ("vllm.v1.sample.sampler:Sampler.sample", "if sampling_metadata.all_greedy:"),
    # Rules for drawn drafts stand in place of the draw, behind everything that makes the law.
    ("vllm.v1.sample.sampler:Sampler.sample", "= self.topk_topp_sampler("),
    # A processor that must see a text grow token by token.
    (
        "vllm.v1.sample.logits_processor.builtin:MinTokensLogitsProcessor.update_state",
        "if len(out_tok_ids) >= min_toks",
    ),
    # Bookkeeping reads the tokens on the host, wherever we leave them.
    ("vllm.v1.sample.rejection_sampler:RejectionSampler.parse_output", "output_token_ids.cpu()"),
    # The validator runs inside the coroutine that we wait before.
    ("vllm.v1.engine.async_llm:AsyncLLM.add_request", "self.input_processor.process_inputs("),
    # The sampler reads history, not drafts, unless it samples a bonus token.
    ("vllm.v1.sample.sampler:Sampler.apply_logits_processors", "if predict_bonus_token and"),
]


@pytest.mark.parametrize(("target", "anchor"), ANCHORS)
def test_the_code_we_rely_on_is_there(target: str, anchor: str) -> None:
    # An import may be wrapped over several lines.
    code = re.sub(r"import \(\s*([^(),]*),?\s*\)", r"import \1", source(target))
    assert anchor in code, f"{target} no longer contains {anchor!r}"
