"""Training in one process, or in several with DDP, where each holds the whole model.

The other engines derive from it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vlm_tune.compat_engines import remove_autocast
from vlm_tune.config.train import TrainSection
from vlm_tune.model.acceleration.lora_layers import merge_projections
from vlm_tune.model.lora import parts
from vlm_tune.model.optimizer_groups import Tuned
from vlm_tune.model.similarity import SIMILARITY
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.model.weights import is_sharded, whole_tensor

WRAPS = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
"""Environment variables under which accelerate itself wraps the model.

That changes what is computed: weights are cast, and `backward` takes steps.
"""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Keys of AdamW's state besides its step."""
State = dict[str, torch.Tensor]
"""The optimizer's tensors on the CPU, unsharded, as `<parameter>|<key>`."""


class Engine:
    """One process, or several that average gradients (DDP), by accelerate.

    Each holds the whole model.
    """

    skips = True
    """Whether a step with a non-finite gradient can be skipped."""
    collects = False
    """Whether all ranks must take part in collecting a checkpoint's content."""
    sharded = False
    """Whether a rank holds only a shard of the weights.

    Then all ranks must run the same modules in the same order.
    """
    uncompiled: str | None = None
    """Why the language model's blocks are not compiled; None where they may be.

    They are not where hooks within them handle weights.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.model: Any = None
        self.inner: Any = None
        self.optimizer: Any = None

    def prepare(self, model: VisionLanguageNetwork, tuned: Tuned, train: TrainSection) -> None:
        """Takes over a model for training; afterwards the objective must call `self.model`."""
        self.inner = model
        self.names = tuned.names
        self.rates = [group["lr"] for group in tuned.groups]
        self.max_grad_norm = train.max_grad_norm or math.inf
        self.optimizer = self._adamw(tuned.groups, train)
        self.model, self.optimizer = self.accelerator.prepare(model, self.optimizer)
        merge_projections(model)

    def _adamw(self, groups: list[dict[str, Any]], train: TrainSection) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            groups,
            betas=(train.betas[0], train.betas[1]),
            weight_decay=train.weight_decay,
            fused=True,
        )

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """The context of a forward and backward pass.

        Gradients are exchanged in the `last` one of a step.
        """
        alone = last or self.accelerator.num_processes == 1
        with (
            self.accelerator.autocast(),
            contextlib.nullcontext() if alone else self.accelerator.no_sync(self.model),
        ):
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of this rank's part of the loss."""
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def clip(self, factor: float) -> torch.Tensor | None:
        """Sets the learning rates to `factor` times their full values and clips the gradient.

        Returns the gradient's norm before clipping, a scalar on its device, for which the host does
        not wait; None where the engine clips within `step`.
        """
        self._set_rates(factor)
        self.accelerator.unscale_gradients()
        parameters = self._parameters()
        total = torch.nn.utils.get_total_norm(
            [each.grad for each in parameters if each.grad is not None]
        )
        # On a CPU, saves a pass over gradients that need no clipping. NaN must take the branch.
        if total.device.type != "cpu":
            clips = math.isfinite(self.max_grad_norm)
        else:
            clips = not float(total) <= self.max_grad_norm
        if clips:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, total)
        return total

    def step(self) -> None:
        """Takes the optimizer step."""
        self.optimizer.step()
        self._drop_gradients()

    def skip(self) -> None:
        """Drops the gradients without a step."""
        if self.accelerator.scaler is not None:
            # The update that `step` would make: it lowers the scale after an overflow, and until it
            # is made the next gradients can't be unscaled.
            self.accelerator.scaler.update()
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        # DDP's gradients are views of its buckets: set to None, they would be allocated again
        # beside these.
        self.optimizer.zero_grad(set_to_none=not isinstance(self.model, DistributedDataParallel))

    def _set_rates(self, factor: float) -> None:
        for group, full in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = full * factor

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the trained parameters with their names, in the optimizer's order."""
        parameters = dict(named_parameters(self.inner))
        for group in self.names:
            for name in group:
                yield name, parameters[name]

    def optimizer_state(self) -> State:
        """The optimizer's state, unsharded, on rank 0; empty on other ranks.

        Every rank must call it.
        """
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        state: State = {}
        for name, parameter in self._named():
            for key, value in inner.state.get(parameter, {}).items():
                tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
                whole = whole_tensor(tensor) if is_sharded(tensor) else tensor
                if self.accelerator.is_main_process:
                    state[f"{name}|{key}"] = whole
        return state

    def load_optimizer_state(self, state: State) -> None:
        """Loads a state of `optimizer_state`, from any engine and number of ranks."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        saved = by_parameter(state)
        for name, parameter in self._named():
            if name in saved:
                inner.state[parameter] = {
                    key: self._share(parameter, key, value) for key, value in saved[name].items()
                }

    def scaler_state(self) -> State:
        """The fp16 gradient scaler's state, the same on every rank; empty without a scaler."""
        scaler = self.accelerator.scaler
        values = {} if scaler is None else scaler.state_dict()
        return {key: torch.from_numpy(np.asarray(value)) for key, value in values.items()}

    def load_scaler_state(self, state: State) -> None:
        """Loads a state of `scaler_state`; an empty one changes nothing."""
        if state and self.accelerator.scaler is not None:
            values = {key: value.item() for key, value in state.items()}
            self.accelerator.scaler.load_state_dict(values)

    def _share(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> torch.Tensor:
        """This rank's share of a tensor of the optimizer's state, on the parameter's device."""
        if key == "step":
            # The fused AdamW reads it where the parameter is: on a GPU, or with CPU offload on the
            # CPU. torch's own `Optimizer.load_state_dict` puts it there as well.
            return value.to(parameter.device, torch.float32)
        # In the parameter's memory format (channels last): the fused step walks both in memory
        # order.
        return torch.empty_like(parameter, requires_grad=False).copy_(value)

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """The context of calls of the model's parts one by one, as in generation."""
        yield

    def release(self) -> None:
        """Releases the model and the optimizer."""
        self.optimizer.zero_grad(set_to_none=True)
        # Removes the autocast that accelerate wrapped around `forward`: the next stage may train in
        # another precision.
        remove_autocast(self.inner)
        self.accelerator.free_memory()
        self.model = self.inner = self.optimizer = None


def by_parameter(state: State) -> dict[str, State]:
    """Groups a state's tensors by parameter, then by key."""
    grouped: dict[str, State] = {}
    for name, value in state.items():
        parameter, _, key = name.rpartition("|")
        grouped.setdefault(parameter, {})[key] = value
    return grouped


def named_parameters(model: VisionLanguageNetwork) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields every parameter with the name that optimizer states and the tuning table use."""
    for part, module in parts(model).items():
        for name, parameter in module.named_parameters():
            yield f"{part}.{name}", parameter
    if model.llm.prompt is not None:
        yield "llm.prompt.values", model.llm.prompt.values
    if model.similarity is not None:
        for name, parameter in model.similarity.named_parameters():
            yield f"{SIMILARITY}.{name}", parameter


def fill(parameter: nn.Parameter, device: torch.device) -> None:
    """Moves a parameter to the device and gives it rank 0's value.

    Ranks that have it on the meta device allocate it first.
    """
    if parameter.is_meta:
        empty = torch.empty_like(parameter, device=device, memory_format=torch.contiguous_format)
        torch.utils.swap_tensors(
            parameter, nn.Parameter(empty, requires_grad=parameter.requires_grad)
        )
    else:
        parameter.data = parameter.data.to(device).contiguous()
    dist.broadcast(parameter.data, 0)


def fill_buffers(model: nn.Module, device: torch.device) -> None:
    """Moves a model's buffers to the device and gives them rank 0's values, as `fill`."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            filled = (
                torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
            )
            dist.broadcast(filled, 0)
            setattr(module, name, filled)


class Filled(nn.Module):
    """A model whose parameters are filled one at a time, while `parameters` is iterated."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        # In a list, so that it is not registered as a submodule.
        self.wrapped = [model]
        self.device = device

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for parameter in self.wrapped[0].parameters():
            fill(parameter, self.device)
            yield parameter
