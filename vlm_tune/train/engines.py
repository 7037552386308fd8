"""Engines: one process, DDP, DeepSpeed's ZeRO stages and FSDP2 behind the few verbs that the loop needs.

The loop's loss is a sum divided by the count of all ranks; every engine averages gradients over ranks, so what goes
backward is scaled up by their number. Trained weights are fp32 and frozen ones in the recipe's precision, under every
engine: the forward pass casts, nothing else does.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vlm_tune.compat import build_no_shared_memory_op
from vlm_tune.config.engine import AnyEngine, AutoEngine, DdpEngine, DeepSpeedEngine, FsdpEngine
from vlm_tune.config.train import TrainSection
from vlm_tune.errors import ModelError, Problem, RecipeError
from vlm_tune.memory_plan.zero import BUCKET
from vlm_tune.model.acceleration.lora_layers import fuse
from vlm_tune.model.layer_index import block_names
from vlm_tune.model.lora import parts
from vlm_tune.model.tuning import Tuned
from vlm_tune.model.vlm import VisionLanguageModel
from vlm_tune.model.weights import is_sharded, whole_tensor

WRAPS = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
"""Under these accelerate wraps the model itself, in ways that change what is computed: weights cast, steps in `backward`."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state beside its step."""

State = dict[str, torch.Tensor]
"""An optimizer's tensors on the CPU, each parameter's whole, as `<parameter>|<key>`."""


class Engine:
    """One process, or several that hold the whole model and average gradients (DDP), by accelerate."""

    skips = True
    """Whether a step whose gradient is not finite can be left out."""
    collects = False
    """Whether all ranks must take part where what a checkpoint holds is collected."""
    sharded = False
    """Whether a rank holds only its share of the weights, so that all must run the same modules in the same order."""
    compiles = True
    """Whether the language model's blocks may be compiled: not where weights or gradients are handled from hooks within them."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.model: Any = None
        self.inner: Any = None
        self.optimizer: Any = None

    def prepare(self, model: VisionLanguageModel, tuned: Tuned, train: TrainSection) -> None:
        """Takes a model to train; from now on `self.model` is what the objective calls."""
        self.inner, self.names = model, tuned.names
        self.rates = [group["lr"] for group in tuned.groups]
        self.max_grad_norm = train.max_grad_norm or math.inf
        self.optimizer = self._adamw(tuned.groups, train)
        self.model, self.optimizer = self.accelerator.prepare(model, self.optimizer)
        fuse(model)

    def _adamw(self, groups: list[dict[str, Any]], train: TrainSection) -> torch.optim.AdamW:
        return torch.optim.AdamW(groups, betas=(train.betas[0], train.betas[1]), weight_decay=train.weight_decay, fused=True)

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Around a forward and backward pass; gradients are exchanged with the last of a step."""
        alone = last or self.accelerator.num_processes == 1
        with self.accelerator.autocast(), contextlib.nullcontext() if alone else self.accelerator.no_sync(self.model):
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of a rank's share of the loss."""
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def clip(self, factor: float) -> float | None:
        """Makes a step ready, at `factor` times the full learning rates: the gradient's norm, which is clipped.

        None where the engine clips as it steps.
        """
        self._set_rates(factor)
        self.accelerator.unscale_gradients()
        parameters = self._parameters()
        found = torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
        norm = float(found)
        # A gradient that is short enough need not be gone through once more.
        if not norm <= self.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, found)
        return norm

    def step(self) -> None:
        """Takes the step."""
        self.optimizer.step()
        self.skip()

    def skip(self) -> None:
        """Leaves the step out."""
        # DDP's gradients lie in what it sends: let go of, they would be made beside it in the next step.
        self.optimizer.zero_grad(set_to_none=not isinstance(self.model, DistributedDataParallel))

    def _set_rates(self, factor: float) -> None:
        for group, full in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = full * factor

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What trains, by name, in the optimizer's order."""
        held = dict(named_parameters(self.inner))
        for group in self.names:
            for name in group:
                yield name, held[name]

    def optimizer_state(self) -> State:
        """The optimizer's state, whole whatever the engine shards; every rank must ask, the first one gets it."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        state: State = {}
        for name, parameter in self._named():
            for key, value in inner.state.get(parameter, {}).items():
                held = value if isinstance(value, torch.Tensor) else torch.tensor(value)
                found = whole_tensor(held) if is_sharded(held) else held
                if self.accelerator.is_main_process:
                    state[f"{name}|{key}"] = found
        return state

    def load_optimizer_state(self, state: State) -> None:
        """Puts a state of `optimizer_state` in place, of whatever engine and number of ranks."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        kept = by_parameter(state)
        for name, parameter in self._named():
            if name in kept:
                inner.state[parameter] = {key: self._share(parameter, key, value) for key, value in kept[name].items()}

    def _share(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> torch.Tensor:
        if key == "step":
            return value
        # In the parameter's own memory format (channels last): the fused step walks both as they lie in memory.
        return torch.empty_like(parameter, requires_grad=False).copy_(value)

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Around calls of the model's parts one by one, as generation does."""
        yield

    def release(self) -> None:
        """Lets go of the model."""
        self.optimizer.zero_grad(set_to_none=True)
        # Takes off the autocast that accelerate wrapped around `forward`: the next stage may train in another precision.
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        self.model = self.inner = self.optimizer = None


def by_parameter(state: State) -> dict[str, State]:
    """A state's tensors by parameter and key."""
    found: dict[str, State] = {}
    for name, value in state.items():
        parameter, _, key = name.rpartition("|")
        found.setdefault(parameter, {})[key] = value
    return found


def named_parameters(model: VisionLanguageModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter by the name that optimizer states and the tuning table know it by."""
    for part, module in parts(model).items():
        for name, parameter in module.named_parameters():
            yield f"{part}.{name}", parameter
    if model.llm.prompt is not None:
        yield "llm.prompt.values", model.llm.prompt.values


# --- weights that no rank holds whole --------------------------------------------------------------------------------


def fill(parameter: nn.Parameter, device: torch.device) -> None:
    """Gives a parameter the first rank's value on every rank; those that hold none yet take memory for it now."""
    if parameter.is_meta:
        empty = torch.empty_like(parameter, device=device, memory_format=torch.contiguous_format)
        torch.utils.swap_tensors(parameter, nn.Parameter(empty, requires_grad=parameter.requires_grad))
    else:
        parameter.data = parameter.data.to(device).contiguous()
    dist.broadcast(parameter.data, 0)


def fill_buffers(model: nn.Module, device: torch.device) -> None:
    """As `fill`, for the buffers of a model."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            held = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
            dist.broadcast(held, 0)
            module._buffers[name] = held


class _Filled(nn.Module):
    """A model whose parameters are filled one at a time, as they are asked for."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.held, self.device = [model], device

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for parameter in self.held[0].parameters():
            fill(parameter, self.device)
            yield parameter


class DeepSpeed(Engine):
    """DeepSpeed's ZeRO: optimizer states (1), gradients (2) and weights (3) in shares, and on the CPU if asked.

    Gradients are its own until the step is taken, and added to if it is not: a run stops at one that is not finite.
    """

    skips = False
    compiles = False

    def __init__(self, accelerator: Accelerator, section: DeepSpeedEngine) -> None:
        super().__init__(accelerator)
        self.section, self.sharded, self.collects = section, shards(section), section.stage > 0

    def prepare(self, model: VisionLanguageModel, tuned: Tuned, train: TrainSection) -> None:
        # It says on the standard output what it builds, where a command's result belongs.
        with contextlib.redirect_stdout(sys.stderr):
            self._prepare(model, tuned, train)

    def _prepare(self, model: VisionLanguageModel, tuned: Tuned, train: TrainSection) -> None:
        import deepspeed

        build_no_shared_memory_op()
        self.inner, self.names = model, tuned.names
        self.rates = [group["lr"] for group in tuned.groups]
        config = self._config(train, sum(parameter.numel() for group in tuned.groups for parameter in group["params"]))
        if self.sharded:
            fill_buffers(model, self.accelerator.device)
            deepspeed.zero.Init(module=_Filled(model, self.accelerator.device), config_dict_or_path=config)
            # It is gathered as it runs, equally often on every rank.
            model.llm.whole_head = True
        for parameter in model.parameters():
            # It sends the bytes as they lie in memory, which a channels-last weight's are not in order.
            parameter.data = parameter.data.contiguous()
        self.model, self.optimizer, _, _ = deepspeed.initialize(model=model, optimizer=self._adamw(tuned.groups, train), config=config)
        if self.section.stage:
            self._start_state()
        if not self.sharded:
            fuse(model)

    def _config(self, train: TrainSection, trained: int) -> dict[str, Any]:
        """DeepSpeed's configuration for so many numbers to train; the recipe's own keys win."""
        section = self.section
        # By default it takes two gigabytes to exchange gradients in, however few there are; this is enough for any link.
        zero: dict[str, Any] = {"stage": section.stage, "reduce_bucket_size": min(trained, BUCKET // 4)}
        zero |= {f"offload_{'param' if what == 'parameters' else what}": {"device": "cpu"} for what in section.offload}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": train.max_grad_norm or 0.0,
            "zero_optimization": zero | section.config.get("zero_optimization", {}),
            # Our AdamW stays: it needs no compiler, and its state is the one of every other engine.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            # Weights are in their types already; nothing is sent in fewer digits than it has.
            "torch_autocast": {"enabled": train.precision != "fp32", "dtype": "bfloat16", "lower_precision_safe_modules": []},
            "steps_per_print": 10**9,
            **{key: value for key, value in section.config.items() if key != "zero_optimization"},
        }

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        self.model.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        self.model.backward(loss * self.accelerator.num_processes, scale_wrt_gas=False)

    def clip(self, factor: float) -> None:
        self._set_rates(factor)

    def step(self) -> None:
        self.model.step()

    def _start_state(self) -> None:
        """Gives the optimizer its state before the first step: DeepSpeed ties parameters to what the first group's step made."""
        flat = self.optimizer.fp32_partitioned_groups_flat if self.sharded else self.optimizer.single_partition_of_fp32_groups
        for share in flat:
            moments = {key: torch.zeros_like(share, requires_grad=False) for key in MOMENTS}
            self.optimizer.optimizer.state[share] = {"step": torch.zeros((), device=share.device), **moments}

    def optimizer_state(self) -> State:
        if self.section.stage == 0:
            return super().optimizer_state()
        from deepspeed.utils import safe_get_full_optimizer_state

        state: State = {}
        step = next(iter(self.optimizer.optimizer.state.values()))["step"]
        for name, parameter in self._named():
            moments = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            if self.accelerator.is_main_process:
                state[f"{name}|step"] = step.cpu()
                state |= {f"{name}|{key}": value.cpu() for key, value in moments.items() if value is not None}
        return state

    def load_optimizer_state(self, state: State) -> None:
        if self.section.stage == 0:
            super().load_optimizer_state(state)
            return
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        kept = by_parameter(state)
        for held in self.optimizer.optimizer.state.values():
            held["step"].copy_(next(iter(kept.values()))["step"])
        if not self.sharded:
            self.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self._named():
            for key in MOMENTS:
                value = kept[name][key].float()
                if not self.sharded:
                    safe_set_full_optimizer_state(parameter, value, key)
                    continue
                # The last rank's share is padded, which setting the whole value does not allow for.
                size: int = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
                padded = nn.functional.pad(value.flatten(), (0, size * self.accelerator.num_processes - value.numel()))
                safe_set_local_optimizer_state(parameter, padded.narrow(0, size * self.accelerator.process_index, size), key)

    def release(self) -> None:
        self.model.destroy()
        self.model = self.inner = self.optimizer = None
        self.accelerator.free_memory()


class Fsdp(Engine):
    """torch's fully sharded data parallel (FSDP2): weights, gradients and optimizer states in shares, block by block."""

    collects = sharded = True
    compiles = False

    def __init__(self, accelerator: Accelerator, section: FsdpEngine) -> None:
        super().__init__(accelerator)
        self.section = section

    def prepare(self, model: VisionLanguageModel, tuned: Tuned, train: TrainSection) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        device = self.accelerator.device
        self.inner, self.names = model, tuned.names
        self.rates = [group["lr"] for group in tuned.groups]
        self.max_grad_norm = train.max_grad_norm or math.inf
        options: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (self.accelerator.num_processes,)),
            "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if self.section.offload else OffloadPolicy(),
        }
        fill_buffers(model, device)
        model.llm.whole_head = True
        for block in [*_blocks(model), model]:
            for parameter in block.parameters():
                if not hasattr(parameter, "device_mesh"):
                    fill(parameter, device)
            fully_shard(block, **options)
        held = dict(named_parameters(model))
        for group, names in zip(tuned.groups, tuned.names, strict=True):
            # In the groups themselves: whoever kept the parameters that were there would keep them whole.
            group["params"] = [held[name] for name in names]
        self.model, self.optimizer = model, self._adamw(tuned.groups, train)

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        # Gradients are exchanged with every micro-batch: kept whole until the last they would be as large as the model.
        with self.accelerator.autocast():
            yield

    def backward(self, loss: torch.Tensor) -> None:
        (loss * self.accelerator.num_processes).backward()

    def clip(self, factor: float) -> float:
        self._set_rates(factor)
        norm: Any = torch.nn.utils.clip_grad_norm_(self._parameters(), self.max_grad_norm)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _share(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> torch.Tensor:
        from torch.distributed.tensor import distribute_tensor

        if key == "step":
            return value
        held: Any = parameter
        device = held.to_local().device
        return distribute_tensor(value.to(device), held.device_mesh, held.placements, src_data_rank=None)

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        # Blocks gather their own weights when they run; what lies between them is gathered by the whole model's forward.
        self.model.unshard()
        try:
            yield
        finally:
            self.model.reshard()

    def release(self) -> None:
        self.model = self.inner = self.optimizer = None
        self.accelerator.free_memory()


def _blocks(model: VisionLanguageModel) -> list[nn.Module]:
    """The blocks of the language model and the tower."""
    found: list[nn.Module] = []
    for part in ("tower", "llm"):
        module = parts(model)[part]
        try:
            found += [module.get_submodule(name) for name in block_names(module)]
        except ModelError:  # a small one without blocks is a share of the whole
            continue
    return found


# --- which one -------------------------------------------------------------------------------------------------------


def resolve_engine(section: AnyEngine) -> AnyEngine:
    """The engine to train with: the recipe's, or where it leaves the choice that of an accelerate config, or DDP.

    Takes what the config says out of the environment, so that accelerate itself joins the processes and does no more.
    Raises `RecipeError` if recipe and config name different ones.
    """
    named = _configured()
    for name in WRAPS:
        os.environ.pop(name, None)
    if isinstance(section, AutoEngine):
        return named or DdpEngine(kind="ddp")
    if named is not None and named.kind != section.kind:
        raise RecipeError([Problem("engine", f"the recipe says {section.kind} and the accelerate config {named.kind}; drop one of them")])
    return section


def _configured() -> AnyEngine | None:
    """The engine of `accelerate launch`'s config; None where it names none."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return FsdpEngine(kind="fsdp", offload=os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return None
    from accelerate.utils import DeepSpeedPlugin

    config = DeepSpeedPlugin().deepspeed_config
    zero = {key: value for key, value in config["zero_optimization"].items() if value not in (None, "auto")}
    places = {what: zero.pop(key, None) or {} for what, key in (("optimizer", "offload_optimizer"), ("parameters", "offload_param"))}
    offload = [what for what, place in places.items() if place.get("device") == "cpu"]
    found = {"kind": "deepspeed", "stage": zero.pop("stage", 2), "offload": offload, "config": {"zero_optimization": zero}}
    return DeepSpeedEngine.model_validate(found)


def shards(section: AnyEngine) -> bool:
    """Whether an engine's processes hold only shares of the weights."""
    return isinstance(section, FsdpEngine) or (isinstance(section, DeepSpeedEngine) and section.stage == 3)


def build_engine(section: AnyEngine, accelerator: Accelerator) -> Engine:
    """The engine of a section that `resolve_engine` gave."""
    if isinstance(section, AutoEngine | DdpEngine):
        return Engine(accelerator)
    if not dist.is_initialized():
        from torch._C._distributed_c10d import HashStore

        # A process alone: the engines want a group all the same.
        backend = "nccl" if accelerator.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    return DeepSpeed(accelerator, section) if isinstance(section, DeepSpeedEngine) else Fsdp(accelerator, section)
