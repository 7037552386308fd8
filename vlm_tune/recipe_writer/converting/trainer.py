"""The arguments of transformers' Trainer, which all four frameworks have."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_tune.paths import is_file
from vlm_tune.recipe_writer.converting.arguments import is_nothing
from vlm_tune.recipe_writer.converting.conversion import Conversion

SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
PRECISIONS = {
    "bfloat16": "bf16",
    "bf16": "bf16",
    "float16": "fp16",
    "fp16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "fp32": "fp32",
}
LONGEST_TIMEOUT = 1e7


@dataclass(frozen=True)
class Defaults:
    """The values that a framework takes where a configuration does not say."""

    epochs: float = 3.0
    batch: int = 8
    accumulation: int = 1
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    beta2: float = 0.999
    schedule: str = "linear"
    checkpointing: bool = False


def convert_trainer(conversion: Conversion, defaults: Defaults) -> None:
    """Converts the arguments of the training loop; what is not given gets the default."""
    _set_name(conversion)
    _set_length(conversion, defaults)
    _set_optimizer(conversion, defaults)
    _set_precision(conversion, defaults)
    _set_intervals(conversion)
    _set_engine(conversion)
    arguments = conversion.arguments
    workers = arguments.count("dataloader_num_workers")
    if workers:
        conversion.set("train.loader_workers", workers, "dataloader_num_workers")
    if arguments.flag("torch_compile"):
        conversion.set("train.compile", True, "torch_compile")
    if arguments.flag("full_determinism"):
        conversion.set("train.deterministic", True, "full_determinism")
    timeout = arguments.number("ddp_timeout")
    if timeout is not None and timeout <= LONGEST_TIMEOUT and timeout != 1800:
        conversion.set("train.timeout", timeout, "ddp_timeout")


def _set_name(conversion: Conversion) -> None:
    arguments = conversion.arguments
    output = arguments.text("output_dir") or "runs/converted"
    run = arguments.text("run_name") or Path(output).name
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", run).strip("-.") or "converted"
    conversion.set("name", name)
    conversion.set("output", output, "output_dir")
    seed = arguments.number("seed")
    conversion.set_or_default("seed", None if seed is None else int(seed), 42, "seed")


def _set_length(conversion: Conversion, defaults: Defaults) -> None:
    arguments = conversion.arguments
    steps = arguments.count("max_steps")
    epochs = arguments.number("num_train_epochs")
    if steps:
        conversion.set("train.steps", steps, "max_steps")
    else:
        conversion.set_or_default("train.epochs", epochs, defaults.epochs, "num_train_epochs")
    for name, key, usual in (
        ("train.batch_size", "per_device_train_batch_size", defaults.batch),
        ("train.gradient_accumulation", "gradient_accumulation_steps", defaults.accumulation),
    ):
        conversion.set_or_default(name, arguments.count(key), usual, key)


def _set_optimizer(conversion: Conversion, defaults: Defaults) -> None:
    arguments = conversion.arguments
    for name, key, usual in (
        ("train.learning_rate", "learning_rate", defaults.learning_rate),
        ("train.weight_decay", "weight_decay", defaults.weight_decay),
    ):
        conversion.set_or_default(name, arguments.number(key), usual, key)
    first = arguments.number("adam_beta1")
    second = arguments.number("adam_beta2")
    betas = [0.9 if first is None else first, defaults.beta2 if second is None else second]
    if betas != [0.9, 0.999]:
        given = None if first is None and second is None else betas
        conversion.set_or_default("train.betas", given, betas, "adam_beta1 and adam_beta2")
    norm = arguments.number("max_grad_norm")
    if norm is not None and norm != 1.0:
        conversion.set("train.max_grad_norm", norm or None, "max_grad_norm")
    optimizer = arguments.text("optim")
    if optimizer and not optimizer.startswith("adamw"):
        arguments.refuse("optim", optimizer, "AdamW is the only optimizer here")
    elif optimizer and "8bit" in optimizer:
        arguments.refuse("optim", optimizer, "AdamW's states are in 32 bit here")
    _set_schedule(conversion, defaults)


def _set_schedule(conversion: Conversion, defaults: Defaults) -> None:
    arguments = conversion.arguments
    kind = arguments.text("lr_scheduler_type") or defaults.schedule
    if kind not in SCHEDULES:
        reason = "the schedules are cosine, linear and constant; cosine is taken"
        arguments.refuse("lr_scheduler_type", kind, reason)
    settings = arguments.take("lr_scheduler_kwargs")
    if settings:
        arguments.refuse("lr_scheduler_kwargs", settings, "schedules end at zero here")
    share = arguments.number("warmup_ratio") or 0.0
    steps = arguments.number("warmup_steps") or 0.0
    whole = conversion.draft.values.get("train.steps")
    if 0 < steps < 1:  # a share, since transformers 5
        share = steps
    elif steps and whole and steps < whole:
        share = round(steps / whole, 6)
    elif steps:
        reason = (
            "the warm-up is a share of all steps here (train.schedule.warmup), and how many there "
            "are depends on the data"
        )
        arguments.refuse("warmup_steps", int(steps), reason)
    schedule = {"kind": SCHEDULES.get(kind, "cosine"), "warmup": share}
    conversion.set("train.schedule", schedule, "lr_scheduler_type and warmup_ratio")


def _set_precision(conversion: Conversion, defaults: Defaults) -> None:
    arguments = conversion.arguments
    named = arguments.text("torch_dtype", "dtype")
    half = arguments.flag("fp16")
    brain = arguments.flag("bf16") | arguments.flag("pure_bf16")
    if half or brain:
        precision = "fp16" if half else "bf16"
        conversion.set("train.precision", precision, precision)
    elif named in PRECISIONS:
        conversion.set("train.precision", PRECISIONS[named], "the model's dtype")
    else:
        conversion.draft.set("train.precision", "bf16", "not given; bf16 is usual")
    key = "gradient_checkpointing"
    given = arguments.flag(key, defaults.checkpointing) if arguments.has(key) else None
    conversion.set_or_default(f"train.{key}", given, defaults.checkpointing, key)


def _set_intervals(conversion: Conversion) -> None:
    """Sets how often is logged, saved and scored, and where logs go."""
    arguments = conversion.arguments
    every = arguments.number("logging_steps")
    if every and every >= 1:
        conversion.set("train.log_every", int(every), "logging_steps")
    strategy = arguments.text("save_strategy") or "steps"
    save = arguments.number("save_steps")
    keep = arguments.count("save_total_limit")
    checkpoints: dict[str, Any] = {}
    if strategy == "steps" and save and save >= 1:
        checkpoints["every"] = int(save)
    if keep:
        checkpoints["keep"] = keep
    if checkpoints:
        conversion.set("train.checkpoints", checkpoints, "save_steps and save_total_limit")
    when = arguments.text("eval_strategy", "evaluation_strategy")
    score = arguments.number("eval_steps")
    if when == "steps" and score and score >= 1:
        conversion.set("evaluate.every", int(score), "eval_steps")
    scored = arguments.count("per_device_eval_batch_size")
    if scored:
        conversion.set("evaluate.batch_size", scored, "per_device_eval_batch_size")
    longest = arguments.count("max_new_tokens")
    if longest:
        conversion.set("evaluate.max_new_tokens", longest, "max_new_tokens")
    trackers = arguments.names("report_to")
    known = [name for name in trackers if name in TRACKERS]
    if known:
        conversion.set("train.trackers", known, "report_to")
    for name in trackers:
        if name not in (*TRACKERS, "all"):
            arguments.refuse("report_to", name, f"the trackers are {', '.join(TRACKERS)}")


def _set_engine(conversion: Conversion) -> None:
    arguments = conversion.arguments
    int8 = conversion.draft.values.get("model.llm", {}).get("quantize") == "int8"
    whole = "int8 weights can't be sharded" if int8 else None
    sharded = arguments.take("fsdp")
    if sharded and whole:
        arguments.refuse("fsdp", sharded, f"{whole}, so the processes are those of DDP")
    elif sharded:
        settings = {"kind": "fsdp", **({"offload": True} if "offload" in str(sharded) else {})}
        conversion.set("engine", settings, "fsdp")
    config = arguments.take("deepspeed")
    if not config:
        return
    settings = _zero_settings(config, conversion.folder)
    if settings is None:
        reason = "neither its file, if it is here, nor its name says the ZeRO stage: set engine"
        arguments.refuse("deepspeed", config, reason)
        return
    if settings["stage"] == 3 and whole:
        arguments.refuse("deepspeed", config, f"{whole}, so engine.stage is 2 and not 3")
        settings = {"stage": 2, "offload": []}
    if not settings["offload"]:
        del settings["offload"]
    conversion.set("engine", {"kind": "deepspeed", **settings}, "deepspeed")


def _zero_settings(config: Any, folder: Path) -> dict[str, Any] | None:
    """The ZeRO stage and what is offloaded: by a DeepSpeed configuration, else by its name."""
    if isinstance(config, str):
        for place in (Path(config), folder / config):
            if is_file(place):
                try:
                    config = json.loads(place.read_text(encoding="utf-8"))
                except (OSError, ValueError, RecursionError):
                    return None
                break
    if isinstance(config, dict):
        zero = config.get("zero_optimization", {})
        stage = zero.get("stage", 0) if isinstance(zero, dict) else None
        if stage not in (0, 1, 2, 3):
            return None
        offload = [
            part
            for part, key in (("optimizer", "offload_optimizer"), ("parameters", "offload_param"))
            if isinstance(zero.get(key), dict) and zero[key].get("device", "none") != "none"
        ]
        return {"stage": stage, "offload": offload}
    name = Path(str(config)).name.lower()
    stage = re.search(r"z(?:ero)?_?([0-3])", name)
    if stage is None:
        return None
    offload = ["optimizer"] if "offload" in name else []
    if offload and stage[1] == "3":
        offload.append("parameters")
    return {"stage": int(stage[1]), "offload": offload}


# --- what is left ---------------------------------------------------------------------------------

QUIET = {
    "accelerator_config", "average_tokens_across_devices", "cache_dir", "config",
    "data_seed", "dataloader_drop_last", "dataloader_persistent_workers", "dataloader_pin_memory",
    "dataloader_prefetch_factor", "ddp_backend", "ddp_find_unused_parameters", "disable_tqdm",
    "do_eval", "do_train", "eval_delay", "eval_on_start",
    "gradient_checkpointing_kwargs", "greater_is_better", "group_by_length", "hub_strategy",
    "hub_token", "include_num_input_tokens_seen", "include_tokens_per_second",
    "load_best_model_at_end", "local_rank", "logging_dir", "logging_first_step",
    "logging_strategy", "log_level", "overwrite_output_dir", "prediction_loss_only", "project",
    "remove_unused_columns", "save_on_each_node", "save_only_model", "save_safetensors",
    "skip_memory_metrics", "tf32", "train_sampling_strategy", "use_liger_kernel",
}  # fmt: skip
"""Keys that change no result, or ask for what a run does here in any case."""

REASONS = {
    "adam_epsilon": "AdamW's epsilon is 1e-8",
    "label_smoothing_factor": "the loss is plain cross-entropy",
    "metric_for_best_model": "the validation score chooses the best checkpoint",
    "neftune_noise_alpha": "no noise is added to embeddings",
    "push_to_hub": "nothing is uploaded; `vlm-tune export` writes what can be",
    "hub_model_id": "nothing is uploaded; `vlm-tune export` writes what can be",
    "resume_from_checkpoint": "a run is resumed by `vlm-tune sft RECIPE --resume`",
    "trust_remote_code": "code that comes with a model is never run",
    "use_cpu": "a run takes the GPU where there is one; --device cpu chooses",
    "auto_find_batch_size": "`vlm-tune plan` says which batch fits",
}


def refuse_left(
    conversion: Conversion,
    quiet: set[str],
    reasons: dict[str, str],
    prefixes: tuple[str, ...] = (),
    usual: dict[str, Any] | None = None,
) -> None:
    """Notes the keys that are left, but those that are quiet or have their default.

    Args:
        conversion: the configuration on its way.
        quiet: keys of the framework that change no result.
        reasons: why keys of the framework have no counterpart.
        prefixes: beginnings of keys of the framework that are quiet.
        usual: defaults of the framework's own keys.
    """
    arguments = conversion.arguments
    left = arguments.left()
    defaults = _trainer_defaults() if left.keys() - quiet - QUIET - reasons.keys() else {}
    defaults |= usual or {}
    for key, value in left.items():
        if key in quiet or key in QUIET or (prefixes and key.startswith(prefixes)):
            continue
        if key in defaults and str(value) == str(defaults[key]):
            continue
        if key in reasons or key in REASONS:
            arguments.refuse(key, value, reasons.get(key) or REASONS[key])
        else:
            arguments.refuse(key, value, "no key of a recipe is known to mean this")


def _trainer_defaults() -> dict[str, Any]:
    """The defaults of transformers' TrainingArguments."""
    from dataclasses import MISSING, fields

    from transformers import TrainingArguments

    return {
        each.name: each.default
        for each in fields(TrainingArguments)
        if each.default is not MISSING and not is_nothing(each.default)
    }
