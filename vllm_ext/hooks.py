# SPDX-License-Identifier: Apache-2.0
"""Every symbol of vLLM that this package touches: what, why, and when the hook can go.

The table is the capability check.  :func:`check` resolves each symbol in the installed vLLM and
compares the parameters that we rely on; :func:`require` refuses all or nothing, before anything is
touched.  The drift tests run the same table, so an upgrade of vLLM that moves a symbol fails there
by name.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

TESTED_VERSIONS = ("0.31", "0.32")
"""``major.minor`` of the vLLM releases the suite has passed on; others give one warning."""


class HookError(RuntimeError):
    """A symbol of vLLM that we need is missing or changed."""


@dataclass(frozen=True, slots=True)
class Hook:
    """One touched symbol.

    Attributes:
        name: short name, used by ``vllm-ext doctor``.
        target: ``module:qualified.name``.
        parameters: names that the callable must accept, in this order, possibly among others.
            ``None`` for symbols that are not called by us.
        why: what we need it for.
        remove_when: the change in vLLM that makes the hook unnecessary.
    """

    name: str
    target: str
    parameters: tuple[str, ...] | None
    why: str
    remove_when: str


@dataclass(frozen=True, slots=True)
class HookReport:
    """Result of checking one :class:`Hook` against the installed vLLM."""

    name: str
    target: str
    ok: bool
    reason: str
    why: str


_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_PLUGGABLE = "vLLM gets a registry of proposers that see logits and may return trees"

FRONTEND = (
    Hook(
        "options",
        "vllm.engine.arg_utils:EngineArgs.create_speculative_config",
        ("self", "target_model_config", "target_parallel_config"),
        'translates {"method": "dyspec", ...} into custom_class + worker_cls + additional_config',
        "SpeculativeConfig accepts method names registered by plugins",
    ),
    Hook(
        "command-line",
        "vllm.engine.arg_utils:EngineArgs.add_cli_args",
        ("parser",),
        "adds our methods to the choices of --spec-method",
        "--spec-method accepts names registered by plugins",
    ),
    Hook(
        "sampling-params",
        "vllm.sampling_params:SamplingParams._validate_spec_decode",
        ("self", "speculative_config"),
        "min_p and logit_bias are exact under our walk; vLLM refuses them under speculation; and a "
        "request's own switch and cap are checked where a bad value is the client's error",
        "vLLM asks the proposer which sampling parameters it supports",
    ),
)

WORKER = (
    Hook(
        "prepare-inputs",
        f"{_RUNNER}._prepare_inputs",
        ("self", "scheduler_output", "num_scheduled_tokens"),
        "after it, positions of tree nodes become base + depth (slots stay sequential)",
        _PLUGGABLE,
    ),
    Hook(
        "attention-metadata",
        f"{_RUNNER}._build_attention_metadata",
        ("self",),
        "after it, the step's trees are attached to each metadata object",
        _PLUGGABLE,
    ),
    Hook(
        "sample",
        f"{_RUNNER}._sample",
        ("self", "logits", "spec_decode_metadata"),
        "the walk: vLLM's own Sampler, level by level, instead of the rejection sampler",
        "vLLM verifies trees with its own sampler",
    ),
    Hook(
        "bookkeeping",
        f"{_RUNNER}._bookkeeping_sync",
        ("self", "scheduler_output", "sampler_output", "logits", "hidden_states"),
        "on the CPU it rolls back generators that cannot be rolled back (a seed with a chunked "
        "prompt kills the engine); we draw nothing for such rows and hide their generators",
        "vLLM stops calling Generator.set_offset on the CPU",
    ),
    Hook(
        "propose",
        f"{_RUNNER}.propose_draft_token_ids",
        (
            "self",
            "scheduler_output",
            "sampled_token_ids",
            "sampling_metadata",
            "hidden_states",
            "sample_hidden_states",
        ),
        "our drafter needs request ids, logits and sampling parameters; custom_class gets none",
        _PLUGGABLE,
    ),
    Hook(
        "drafter-fits",
        f"{_RUNNER}._input_fits_in_drafter",
        ("self", "common_attn_metadata"),
        "near max_model_len the stock answer publishes zeros as drafts; we size the tree instead",
        _PLUGGABLE,
    ),
    Hook(
        "request-removed",
        f"{_RUNNER}._on_request_state_removed",
        ("self", "req_id", "req_state"),
        "documented hook: drops the drafting state of a finished request",
        "stays: it is a documented hook",
    ),
    Hook(
        "sample-tokens",
        f"{_RUNNER}.sample_tokens",
        ("self", "grammar_output"),
        "after it, the step's drafts are enclosed in its output",
        "vLLM's runner returns drafts with the sampled tokens",
    ),
    Hook(
        "take-drafts",
        f"{_RUNNER}.take_draft_token_ids",
        ("self",),
        "the drafts that are enclosed, as vLLM's scheduler expects them",
        "stays: it is called, not changed",
    ),
    Hook(
        "execute-model",
        f"{_RUNNER}.execute_model",
        ("self", "scheduler_output", "intermediate_tensors"),
        "only timed: the cost model needs the latency of a step",
        "stays: nothing of it is changed",
    ),
    Hook(
        "dummy-run",
        f"{_RUNNER}._dummy_run",
        ("self", "num_tokens"),
        "start-up measurement of the forward pass at several row counts",
        "stays: nothing of it is changed",
    ),
    Hook(
        "logits-processors",
        "vllm.v1.worker.gpu_model_runner:build_logitsprocs",
        ("vllm_config", "device", "is_pin_memory", "is_pooling_model", "custom_logitsprocs"),
        "custom processors, min_p and logit_bias are built although a speculative config is set",
        "vLLM builds them when the proposer says that its verifier honours them",
    ),
    Hook(
        "sampler",
        "vllm.v1.sample.sampler:Sampler.forward",
        ("self", "logits", "sampling_metadata"),
        "called once per level of the walk",
        "stays: it is called, not changed",
    ),
    Hook(
        "sampler-draw",
        "vllm.v1.sample.ops.topk_topp_sampler:TopKTopPSampler.forward_native",
        ("self", "logits", "generators", "k", "p"),
        "drafts drawn from a draft model: while they are verified our rules stand in its place, at "
        "Sampler.topk_topp_sampler, and are called as it is",
        "vLLM's Sampler takes the draw as an argument",
    ),
    Hook(
        "top-k-top-p",
        "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p",
        ("logits", "k", "p"),
        "the walk on the device and the rules for drawn drafts filter rows as the Sampler does",
        "vLLM's Sampler takes the draw as an argument",
    ),
    Hook(
        "parse-output",
        "vllm.v1.sample.rejection_sampler:RejectionSampler.parse_output",
        ("output_token_ids", "vocab_size", "discard_req_indices", "logprobs_tensors"),
        "reads our ragged rows of accepted tokens; -1 marks the unused places",
        "stays: it is called by the runner on what we return",
    ),
    Hook(
        "register-backend",
        "vllm.v1.attention.backends.registry:register_backend",
        ("backend", "class_path"),
        "official door: puts tree-aware backends in place of the stock ones in our worker only",
        "stays: it is an official door",
    ),
)
"""Touched by every worker."""

DRAFT = (
    Hook(
        "draft-slots",
        "vllm.config.vllm:VllmConfig.num_lookahead_tokens",
        None,
        "read by the scheduler: a draft model writes keys and values beyond the scheduled tokens",
        "vLLM asks the proposer of custom_class how many slots it needs",
    ),
    Hook(
        "draft-load",
        "vllm.model_executor.model_loader:get_model",
        ("vllm_config", "model_config", "prefix"),
        "loads the draft model; its layers get their share of the KV cache by being built",
        "stays: it is called, not changed",
    ),
    Hook(
        "draft-config",
        "vllm.config:ModelConfig",
        ("model", "runner", "tokenizer", "dtype", "spec_target_max_model_len", "quantization"),
        "describes the draft model, and refuses what vLLM cannot load",
        "custom_class may name a draft model",
    ),
    Hook(
        "draft-config-copy",
        "vllm.config.utils:replace",
        ("dataclass_instance", "kwargs"),
        "the engine's configuration with the draft model in place of the target",
        "stays: it is called, not changed",
    ),
    Hook(
        "draft-tag",
        "vllm.compilation.backends:set_model_tag",
        ("tag",),
        "keeps the compiled draft model apart from the compiled target",
        "stays: it is called, not changed",
    ),
    Hook(
        "draft-context",
        "vllm.forward_context:set_forward_context",
        ("attn_metadata", "vllm_config", "num_tokens", "slot_mapping"),
        "gives the draft model's layers their metadata and slots",
        "stays: it is called, not changed",
    ),
    Hook(
        "draft-metadata",
        "vllm.v1.attention.backend:CommonAttentionMetadata",
        (
            "query_start_loc",
            "query_start_loc_cpu",
            "seq_lens",
            "num_reqs",
            "num_actual_tokens",
            "max_query_len",
            "max_seq_len",
            "block_table_tensor",
            "slot_mapping",
            "causal",
            "positions",
            "is_prefilling",
            "seq_lens_cpu_upper_bound",
        ),
        "what vLLM's builders make the attention metadata of a draft pass from",
        "stays: it is called, not changed",
    ),
    Hook(
        "draft-builder",
        "vllm.v1.attention.backend:AttentionMetadataBuilder.__init__",
        ("self", "kv_cache_spec", "layer_names", "vllm_config", "device"),
        "a builder for the draft model's layers alone",
        "stays: it is called, not changed",
    ),
    Hook(
        "draft-blocks",
        "vllm.v1.worker.block_table:BlockTable.get_numpy_array",
        ("self",),
        "the target's block tables say where the draft model's keys and values lie",
        "stays: it is read, not changed",
    ),
    Hook(
        "draft-groups",
        "vllm.v1.kv_cache_interface:UniformTypeKVCacheSpecs",
        None,
        "layers of different sizes that share one block table",
        "stays: it is read, not changed",
    ),
)
"""Touched where a draft model is used."""

PEARL = (
    Hook(
        "forward",
        f"{_RUNNER}._model_forward",
        ("self", "input_ids", "positions"),
        "the draft model runs beside it, in another thread",
        "vLLM lets a proposer run beside the target",
    ),
    Hook(
        "forward-context",
        "vllm.forward_context:override_forward_context",
        ("forward_context",),
        "while two threads run models each needs its own context, and vLLM has one for all",
        "the forward context belongs to a thread",
    ),
    Hook(
        "forward-context-made",
        "vllm.forward_context:create_forward_context",
        ("attn_metadata", "vllm_config", "slot_mapping", "skip_compiled"),
        "makes the context of the drafting thread",
        "stays: it is called, not changed",
    ),
    Hook(
        "linear-kernels",
        "vllm._custom_ops:_supports_onednn",
        None,
        "unset while the draft model is loaded, for vLLM's oneDNN kernels share one scratchpad per "
        "process and cannot run in two threads",
        "vLLM's CPU kernels are reentrant",
    ),
)
"""Touched where a draft model runs beside the target."""

CPU = (
    Hook(
        "worker-cpu",
        "vllm.v1.worker.cpu_worker:CPUWorker.init_device",
        ("self",),
        "our CPU worker puts the runner subclass in place while this runs",
        "CPUWorker builds its runner through _make_model_runner(), as the GPU worker does",
    ),
    Hook(
        "runner-cpu",
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner.__init__",
        ("self", "vllm_config", "device"),
        "base class of the CPU runner",
        _PLUGGABLE,
    ),
    Hook(
        "draft-rows",
        f"{_RUNNER}._calc_spec_decode_metadata",
        ("self", "num_draft_tokens", "cu_num_scheduled_tokens"),
        "of a step without drafts only the rows to sample are computed, not where its drafts lie",
        "vLLM makes no such metadata for a step without drafts",
    ),
    Hook(
        "draft-rows-made",
        "vllm.v1.spec_decode.metadata:SpecDecodeMetadata",
        (
            "draft_token_ids",
            "num_draft_tokens",
            "cu_num_draft_tokens",
            "cu_num_sampled_tokens",
            "target_logits_indices",
            "bonus_logits_indices",
            "logits_indices",
        ),
        "what the stock method returns",
        "as draft-rows",
    ),
    Hook(
        "cpu-attention",
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward",
        ("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
        "rows of branching trees get tree attention, all others the stock kernel",
        "vLLM's CPU kernel takes a mask per request",
    ),
    Hook(
        "cpu-kv-write",
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update",
        ("self", "layer", "key", "value", "kv_cache", "slot_mapping"),
        "accepted nodes are written to their final slots by the backend's own writer",
        "stays: it is called, not changed",
    ),
)
"""Touched by the CPU worker only."""

CUDA = (
    Hook(
        "worker-cuda",
        "vllm.v1.worker.gpu_worker:Worker.init_device",
        ("self",),
        "our CUDA worker puts the runner subclass in place while this runs",
        "vLLM 0.31, which lacks the hook _make_model_runner(), is no longer supported",
    ),
    Hook(
        "cuda-graphs",
        f"{_RUNNER}._determine_batch_execution_and_padding",
        ("self", "num_tokens", "num_reqs", "force_uniform_decode"),
        "a step with branching trees must not replay a CUDA graph that holds the stock attention",
        "vLLM lets attention metadata veto full CUDA graphs",
    ),
    Hook(
        "cuda-graph-sizes",
        f"{_RUNNER}._check_and_update_cudagraph_mode",
        ("self", "attention_backends", "kv_cache_groups"),
        "before it, uniform_decode_query_len becomes 1, so that steps without drafts replay the "
        "full graphs that they replay without speculation",
        "vLLM captures graphs for steps without drafts under speculation",
    ),
    Hook(
        "cuda-graph-keys",
        "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher.initialize_cudagraph_keys",
        ("self", "cudagraph_mode", "uniform_decode_query_len"),
        "its uniform_decode_query_len has to be the runner's",
        "as cuda-graph-sizes",
    ),
    Hook(
        "backend-classes",
        "vllm.v1.attention.backends.registry:AttentionBackendEnum.get_class",
        ("self",),
        "vLLM resolves a backend's class by the path that we register",
        "stays: it is called by vLLM on what we register",
    ),
    Hook(
        "flash-attention",
        "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.forward",
        ("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
        "decoding rows of a step with branching trees go to the Triton kernel",
        "vLLM's kernels take a mask per request",
    ),
    Hook(
        "flash-kv-write",
        "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.do_kv_cache_update",
        ("self", "layer", "key", "value", "kv_cache", "slot_mapping"),
        "accepted nodes are written to their final slots by the backend's own writer",
        "stays: it is called, not changed",
    ),
    Hook(
        "triton-attention",
        "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.forward",
        ("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
        "as flash-attention",
        "vLLM's kernels take a mask per request",
    ),
    Hook(
        "triton-kv-write",
        "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.do_kv_cache_update",
        ("self", "layer", "key", "value", "kv_cache", "slot_mapping"),
        "as flash-kv-write",
        "stays: it is called, not changed",
    ),
    Hook(
        "kv-strides",
        "vllm.utils.torch_utils:canonicalize_singleton_dim_strides",
        ("t",),
        "FlashAttention gets keys and values with strides that its loads take, as from vLLM",
        "stays: it is called, not changed",
    ),
    Hook(
        "metadata-builder",
        "vllm.v1.attention.backend:AttentionMetadataBuilder.build",
        ("self", "common_prefix_len", "common_attn_metadata"),
        "the start-up self-test runs the stock kernel on metadata of its own",
        "stays: it is called, not changed",
    ),
    Hook(
        "temperature",
        "vllm.v1.sample.sampler:Sampler.apply_temperature",
        ("logits", "temp", "all_random"),
        "the walk on the device scales rows as the Sampler does",
        "vLLM's Sampler takes its noise as an argument",
    ),
    Hook(
        "greedy",
        "vllm.v1.sample.sampler:Sampler.greedy_sample",
        ("logits",),
        "the walk on the device breaks ties as the Sampler does",
        "vLLM's Sampler takes its noise as an argument",
    ),
)
"""Touched by the CUDA worker only."""

CONSTRAINTS = (
    Hook(
        "admission",
        "vllm.v1.engine.input_processor:InputProcessor._build_logits_processors_params_validator",
        ("self",),
        "extends the validator of each request by one that knows the model: constraints are "
        "compiled, and refused with HTTP 400, before they reach the engine",
        "LogitsProcessor.validate_params is told the model and the configuration",
    ),
    Hook(
        "admission-async",
        "vllm.v1.engine.async_llm:AsyncLLM.add_request",
        ("self", "request_id", "prompt", "params"),
        "waits for a constraint's compilation before the validator asks for the result, which "
        "would hold up the event loop",
        "vLLM validates requests off the event loop",
    ),
    Hook(
        "records",
        "vllm.v1.worker.worker_base:WorkerBase",
        None,
        "gets one more method, through which collective_rpc fetches weights and outcomes",
        "logits processors may return data with a request's output",
    ),
)

EXECUTOR = (
    Hook(
        "executor-sample",
        "vllm.v1.executor.multiproc_executor:MultiprocExecutor.sample_tokens",
        ("self", "grammar_output", "non_block"),
        "keeps the drafts that our worker has enclosed in a step's output",
        "vLLM's runner returns drafts with the sampled tokens",
    ),
    Hook(
        "executor-drafts",
        "vllm.v1.executor.multiproc_executor:MultiprocExecutor.take_draft_token_ids",
        ("self",),
        "answers from the enclosed drafts, which saves a message to the worker and back per step",
        "vLLM's runner returns drafts with the sampled tokens",
    ),
)
"""Touched in the engine's process, where workers are processes; without it a step takes longer."""

ALL = FRONTEND + EXECUTOR + WORKER + DRAFT + PEARL + CPU + CUDA + CONSTRAINTS


def resolve(target: str) -> Any:
    """Return the object named ``module:qualified.name``.

    Raises:
        HookError: the module or an attribute is missing.
    """
    module_name, _, qualname = target.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise HookError(f"cannot import {module_name}: {error}") from error
    for part in qualname.split("."):
        if not hasattr(found, part):
            raise HookError(f"{target} does not exist in the installed vLLM")
        found = getattr(found, part)
    return found


def check_one(hook: Hook) -> HookReport:
    """Check one hook against the installed vLLM, without touching anything."""
    try:
        found = resolve(hook.target)
    except HookError as error:
        return HookReport(hook.name, hook.target, False, str(error), hook.why)
    if hook.parameters is not None:
        accepted = list(inspect.signature(found).parameters)
        positions = [accepted.index(p) if p in accepted else -1 for p in hook.parameters]
        if -1 in positions or positions != sorted(positions):
            reason = f"parameters are {accepted}, we rely on {list(hook.parameters)}"
            return HookReport(hook.name, hook.target, False, reason, hook.why)
    return HookReport(hook.name, hook.target, True, "present, parameters as expected", hook.why)


def check(hooks: tuple[Hook, ...] = ALL) -> list[HookReport]:
    """Check every hook.  Needs vLLM installed; changes nothing."""
    return [check_one(hook) for hook in hooks]


def require(hooks: tuple[Hook, ...]) -> None:
    """Refuse to go on unless every hook is in place.

    Raises:
        HookError: names each missing or changed symbol.
    """
    failed = [report for report in check(hooks) if not report.ok]
    if failed:
        listed = "; ".join(f"{report.name} ({report.target}): {report.reason}" for report in failed)
        raise HookError(
            f"vllm-ext cannot work with this vLLM: {listed}. Use a tested version "
            f"({', '.join(TESTED_VERSIONS)}) or set VLLM_EXT_DISABLE=1."
        )
