"""A DeepSpeed config as a form: what is no object, keys that nobody reads, values that DeepSpeed refuses.

Names and behaviour are those of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch.optim import lr_scheduler

from sharded_adopt.interop.config_options import meant
from sharded_adopt.interop.deepspeed_finding import ERROR, WARNING, Finding, at, is_on, stage

_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu")
# Top-level keys without which a run is another one, and those that it does not feel in what it trains.
_DECIDES = (
    *_BATCH,
    *("gradient_accumulation_steps", "managed_gradient_accumulation", "gradient_clipping", "optimizer", "scheduler"),
    *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "fp16", "bf16", "bfloat16"),
    *("torch_autocast", "prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op", "data_types"),
    *("communication_data_type", "seq_parallel_communication_data_type", "data_efficiency", "checkpoint", "pipeline"),
    *("tensor_parallel", "expert_parallel", "sequence_parallel_size", "weight_quantization"),
    *("dataloader_drop_last", "use_data_before_expert_parallelism"),
)
_ASIDE = (
    *("steps_per_print", "dump_state", "disable_python_gc", "disable_allgather", "activation_checkpointing", "aio"),
    *("flops_profiler", "wall_clock_breakdown", "memory_breakdown", "autotuning", "hybrid_engine", "log_level"),
    *("datastates_ckpt", "compile", "timers", "tensorboard", "wandb", "csv_monitor", "comet", "comms_logger"),
    "data_parallel_size",
)
_REMOVED = (
    *("amp", "nebula", "compression_training", "quantize_training", "sparse_gradients", "eigenvalue"),
    *("sparse_attention", "elasticity", "graph_harvesting", "curriculum_learning", "progressive_layer_drop"),
)
# These may be written with "stage3_" before them.
_STAGE3 = (
    *("gather_16bit_weights_on_model_save", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size"),
    *("model_persistence_threshold", "module_granularity_threshold", "param_persistence_threshold"),
    *("allgather_sequential", "use_all_reduce_for_fetch_params"),
)
# The keys of the sections that DeepSpeed checks: it stops for any other.
CHECKED: dict[tuple[str, ...], tuple[str, ...]] = {
    ("zero_optimization",): (
        *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce"),
        *("allgather_partitions", "allgather_bucket_size", "overlap_comm", "compute_grad_norm", "zenflow"),
        *("load_from_fp32_weights", "elastic_checkpoint", "offload_param", "offload_optimizer", "sub_group_size"),
        *("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory", "ignore_unused_parameters"),
        *("legacy_stage1", "round_robin_gradients", "parameter_alignment", "zero_hpz_partition_size"),
        *("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"),
        *("memory_efficient_linear", "pipeline_loading_checkpoint", "override_module_apply", "leaf_module"),
        *("log_trace_cache_warnings", "enable_sanity_checks", "save_muon_momentum_buffer_in_memory"),
        *(*_STAGE3, *(f"stage3_{key}" for key in _STAGE3), "stage3_gather_fp16_weights_on_model_save"),
    ),
    ("zero_optimization", "offload_optimizer"): (
        *("device", "nvme_path", "buffer_count", "pin_memory", "pipeline_read", "pipeline_write", "fast_init"),
        *("ratio", "super_offload", "cpuadam_cores_perc"),
    ),
    ("zero_optimization", "offload_param"): (
        *("device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"),
    ),
    ("fp16",): (
        *("enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis"),
        *("consecutive_hysteresis", "min_loss_scale", "fp16_master_weights_and_grads"),
    ),
    ("bf16",): (
        *("enabled", "immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads"),
        *("bf16_optimizer_states",),
    ),
}
# The sections that DeepSpeed reads two or three keys of, and whose others it passes over in silence.
_READ = {"optimizer": ("type", "params", "legacy_fusion"), "scheduler": ("type", "params")}
# What must be an object, and what may stand there besides.
_OBJECTS: dict[tuple[str, ...], tuple[Any, ...]] = {
    **dict.fromkeys([("optimizer",), ("scheduler",), ("fp16",), ("checkpoint",), ("data_types",)], ()),
    ("bf16",): (None,),
    ("zero_optimization",): (True, False),
    ("optimizer", "params"): (None,),
    ("scheduler", "params"): (),
    ("zero_optimization", "offload_optimizer"): (None,),
    ("zero_optimization", "offload_param"): (None,),
}
_DEEPSPEEDS_SCHEDULERS = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")


def shapes(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what is not the object, or the name, that DeepSpeed expects: it stops, mostly with an AttributeError."""
    for path, others in _OBJECTS.items():
        holder, key = at(config, *path[:-1]), path[-1]
        if key in holder and not isinstance(held := holder[key], Mapping) and not any(held is each for each in others):
            yield _shape(".".join(path), "an object with keys", held, f'"{key}": {{...}}')
    for section in _READ:
        kind = at(config, section).get("type")
        if kind is not None and not isinstance(kind, str):
            example = "ADOPT" if section == "optimizer" else "WarmupLR"
            yield _shape(f"{section}.type", "a name", kind, f'"type": "{example}"')


def not_an_object(config: object) -> Finding:
    """Return the finding for a whole config that is no object."""
    return _shape("config", "an object with keys", config, '{"optimizer": {...}, ...}')


def _shape(where: str, expected: str, got: object, change: str) -> Finding:
    return Finding(ERROR, "shape", where, f"expected {expected}, got {json.dumps(got, default=str)}", change)


def keys(config: Mapping[str, Any], options: Iterable[str], filled: Iterable[str] = ()) -> Iterator[Finding]:
    """Yield the keys that are misspelt or not read.

    `options`: those of `optimizer.params`. `filled`: keys and options for which "auto" is to be written.
    """
    yield from _top_level(config, tuple(filled))
    for section, read in _READ.items():
        inside = options if section == "optimizer" else ()
        for key, value in at(config, section).items():
            if key not in read:
                yield _not_read(section, key, value, read, tuple(inside), tuple(filled))
    for path, known in CHECKED.items():
        for key, value in at(config, *path).items():
            if key not in known:
                near = _near(key, known)
                change = f'"{near}": {json.dumps(value)}' if near else f'take "{key}" out'
                message = f"DeepSpeed knows no such key in {path[-1]!r}, and stops"
                yield Finding(ERROR, "key", ".".join((*path, key)), message, change)


def _top_level(config: Mapping[str, Any], filled: tuple[str, ...]) -> Iterator[Finding]:
    for key, value in config.items():
        if key in _REMOVED:
            yield Finding(ERROR, "removed", key, "DeepSpeed has taken it out, and stops", f'take "{key}" out')
        elif key not in (*_DECIDES, *_ASIDE) and (near := _near(key, (*_DECIDES, *_ASIDE))):
            severity = ERROR if near in _DECIDES else WARNING
            message = "DeepSpeed reads no such key, and passes it over in silence"
            yield Finding(severity, "key", key, message, _line(near, "auto" if near in filled else value))


def _not_read(
    section: str, key: str, value: Any, read: tuple[str, ...], options: tuple[str, ...], filled: tuple[str, ...]
) -> Finding:
    where, message = f"{section}.{key}", f'DeepSpeed reads "type" and "params" of {section!r}, and passes this over'
    near = _near(key, read)
    inside = key if key in options else None if near else meant(key, options) if options else None
    if inside:
        value = "auto" if inside in filled else value
        return Finding(ERROR, "key", where, message, f'"params": {{"{inside}": {json.dumps(value)}}}')
    if near:
        return Finding(ERROR, "key", where, message, _line(near, value))
    return Finding(WARNING, "key", where, message, f'into "params", or take "{key}" out')


def _near(key: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(str(key).lower(), tuple(known), 1, 0.8)), None)


def _line(key: str, value: Any) -> str:
    """`"key": value`, long values shortened: what is wrong is the name."""
    written = json.dumps(value)
    return f'"{key}": {written if len(written) <= 60 else "{...}"}'


def values(config: Mapping[str, Any], hf: bool) -> Iterator[Finding]:
    """Yield the values for which DeepSpeed stops; with `hf` its "auto" and a batch size left out are filled in."""
    yield from _batch(config, hf)
    clip = config.get("gradient_clipping", 1.0)
    if clip != "auto" and not isinstance(clip, (int, float)):
        change = '"gradient_clipping": 0.0 for none, or the bound as a number'
        message = f"expected a number, got {json.dumps(clip)}: DeepSpeed stops when it first clips"
        yield Finding(ERROR, "value", "gradient_clipping", message, change)
    if "stage" in at(config, "zero_optimization") and stage(config) is None:
        got = json.dumps(at(config, "zero_optimization").get("stage"))
        yield Finding(ERROR, "value", "zero_optimization.stage", f"expected 0, 1, 2 or 3, got {got}", '"stage": 2')
    if all(is_on(at(config, key).get("enabled")) for key in ("fp16", "bf16")):
        message = "DeepSpeed refuses fp16 and bf16 together"
        yield Finding(ERROR, "value", "fp16.enabled", message, 'take "fp16" or "bf16" out')
    yield from _scheduler(config)


def _batch(config: Mapping[str, Any], hf: bool) -> Iterator[Finding]:
    if not hf and all(config.get(key) is None for key in _BATCH):
        message = "DeepSpeed wants it, or train_batch_size, and stops without"
        yield Finding(ERROR, "value", _BATCH[1], message, f'"{_BATCH[1]}": 8')
    for key in (*_BATCH, "gradient_accumulation_steps"):
        size = config.get(key)
        if size is not None and size != "auto" and not (isinstance(size, int) and size > 0):
            message = f"expected a positive whole number, got {json.dumps(size)}"
            yield Finding(ERROR, "value", key, message, f'"{key}": {8 if key in _BATCH else 1}')


def _scheduler(config: Mapping[str, Any]) -> Iterator[Finding]:
    scheduler = config.get("scheduler")
    if not isinstance(scheduler, Mapping):
        return
    kind = scheduler.get("type")
    if kind is None:
        message = "without a type DeepSpeed makes no scheduler, in silence"
        yield Finding(ERROR, "scheduler", "scheduler.type", message, '"type": "WarmupLR"')
    elif isinstance(kind, str) and kind not in _DEEPSPEEDS_SCHEDULERS and not hasattr(lr_scheduler, kind):
        folded = {name.lower(): name for name in (*_DEEPSPEEDS_SCHEDULERS, *lr_scheduler.__all__)}
        near = next(iter(difflib.get_close_matches(kind.lower(), folded, 1)), None)
        change = f'"type": "{folded[near]}"' if near else f'"type": one of {", ".join(_DEEPSPEEDS_SCHEDULERS)}'
        message = f"neither DeepSpeed nor torch.optim.lr_scheduler has {kind!r}; DeepSpeed stops"
        yield Finding(ERROR, "scheduler", "scheduler.type", message, change)
    if kind is not None and "params" not in scheduler:
        yield Finding(ERROR, "scheduler", "scheduler.params", "DeepSpeed stops without it", '"params": {}')
