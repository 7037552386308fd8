"""Training in one process, or in several by DDP: each holds the whole model. The other engines build on it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vlm_tune.config.engine import AnyEngine, DeepSpeedEngine, FsdpEngine
from vlm_tune.config.train import TrainSection
from vlm_tune.model.acceleration.lora_layers import fuse
from vlm_tune.model.lora import parts
from vlm_tune.model.tuning import Tuned
from vlm_tune.model.vlm import VisionLanguageNetwork
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

    def prepare(self, model: VisionLanguageNetwork, tuned: Tuned, train: TrainSection) -> None:
        """Takes a model to train; from now on `self.model` is what the objective calls."""
        self.inner = model
        self.names = tuned.names
        self.rates = [group["lr"] for group in tuned.groups]
        self.max_grad_norm = train.max_grad_norm or math.inf
        self.optimizer = self._adamw(tuned.groups, train)
        self.model, self.optimizer = self.accelerator.prepare(model, self.optimizer)
        fuse(model)

    def _adamw(self, groups: list[dict[str, Any]], train: TrainSection) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            groups,
            betas=(train.betas[0], train.betas[1]),
            weight_decay=train.weight_decay,
            fused=True,
        )

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Around a forward and backward pass; gradients are exchanged with the last of a step."""
        alone = last or self.accelerator.num_processes == 1
        with (
            self.accelerator.autocast(),
            contextlib.nullcontext() if alone else self.accelerator.no_sync(self.model),
        ):
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
        found = torch.nn.utils.get_total_norm(
            [each.grad for each in parameters if each.grad is not None]
        )
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
                inner.state[parameter] = {
                    key: self._share(parameter, key, value) for key, value in kept[name].items()
                }

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


def named_parameters(model: VisionLanguageNetwork) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter by the name that optimizer states and the tuning table know it by."""
    for part, module in parts(model).items():
        for name, parameter in module.named_parameters():
            yield f"{part}.{name}", parameter
    if model.llm.prompt is not None:
        yield "llm.prompt.values", model.llm.prompt.values


def fill(parameter: nn.Parameter, device: torch.device) -> None:
    """Gives a parameter the first rank's value on every rank; those that hold none yet take memory for it now."""
    if parameter.is_meta:
        empty = torch.empty_like(parameter, device=device, memory_format=torch.contiguous_format)
        torch.utils.swap_tensors(
            parameter, nn.Parameter(empty, requires_grad=parameter.requires_grad)
        )
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


class Filled(nn.Module):
    """A model whose parameters are filled one at a time, as they are asked for."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.held = [model]
        self.device = device

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for parameter in self.held[0].parameters():
            fill(parameter, self.device)
            yield parameter


def shards(section: AnyEngine) -> bool:
    """Whether an engine's processes hold only shares of the weights."""
    return isinstance(section, FsdpEngine) or (
        isinstance(section, DeepSpeedEngine) and section.stage == 3
    )
