"""torch's fully sharded data parallel (FSDP2)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from vlm_tune.config.engine import FsdpEngine
from vlm_tune.config.train import TrainSection
from vlm_tune.errors import ModelError
from vlm_tune.model.acceleration.sharded_4bit import replace_4bit_layers
from vlm_tune.model.layer_index import block_names
from vlm_tune.model.lora import parts
from vlm_tune.model.optimizer_groups import Tuned
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.train.engines.base import Engine, fill, fill_buffers, named_parameters

DEFERRED = 0.1
"""Share of all weights that trains, up to which gradients are exchanged once a step.

Until then each rank accumulates them whole.
"""


class Fsdp(Engine):
    """FSDP2: weights, gradients and optimizer states are sharded block by block.

    In bf16 each rank keeps its shards of trained weights in fp32. They are gathered as bf16, and
    gradients are summed in fp32. A tower with running statistics is gathered in its own types:
    batch norms take no bf16 weights beside fp32 statistics.
    """

    collects = sharded = True

    def __init__(self, accelerator: Accelerator, section: FsdpEngine) -> None:
        super().__init__(accelerator)
        self.section = section

    def prepare(self, model: VisionLanguageNetwork, tuned: Tuned, train: TrainSection) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            MixedPrecisionPolicy,
            OffloadPolicy,
            fully_shard,
        )

        device = self.accelerator.device
        self.inner = model
        self.names = tuned.names
        self.rates = [group["lr"] for group in tuned.groups]
        self.max_grad_norm = train.max_grad_norm or math.inf
        options: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (self.accelerator.num_processes,)),
            "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda")
            if self.section.offload
            else OffloadPolicy(),
        }
        sizes = [(each.numel(), each.requires_grad) for each in model.parameters()]
        trained = sum(size for size, trains in sizes if trains)
        # Offloading says that memory is short, and unsharded gradients are on the device.
        self._defers = not self.section.offload and trained <= DEFERRED * sum(
            size for size, _ in sizes
        )
        replace_4bit_layers(model)
        fill_buffers(model, device)
        model.llm.whole_head = True
        for block, castable in [*_blocks(model), (model, True)]:
            for parameter in block.parameters():
                if not hasattr(parameter, "device_mesh"):
                    fill(parameter, device)
            policy = MixedPrecisionPolicy()
            if train.precision == "bf16" and castable:
                policy = MixedPrecisionPolicy(
                    param_dtype=torch.bfloat16,
                    reduce_dtype=torch.float32,
                    # The model's own input is a batch, whose tensors have their types; blocks of a
                    # native model take rotary tables that their code keeps in fp32.
                    cast_forward_inputs=block is not model and not model.llm.native,
                )
            fully_shard(block, mp_policy=policy, **options)
        parameters = dict(named_parameters(model))
        for group, names in zip(tuned.groups, tuned.names, strict=True):
            # Replaced in the groups: references to the parameters from before would keep them
            # unsharded.
            group["params"] = [parameters[name] for name in names]
        self.model, self.optimizer = model, self._adamw(tuned.groups, train)

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        # Unsharded until the last micro-batch, the gradients of a whole model would be as large as
        # the model.
        self.model.set_requires_gradient_sync(last or not self._defers)
        with self.accelerator.autocast():
            yield

    def backward(self, loss: torch.Tensor) -> None:
        (loss * self.accelerator.num_processes).backward()

    def clip(self, factor: float) -> torch.Tensor:
        self._set_rates(factor)
        norm: Any = torch.nn.utils.clip_grad_norm_(self._parameters(), self.max_grad_norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _share(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> torch.Tensor:
        from torch.distributed.tensor import distribute_tensor

        if key == "step":
            return super()._share(parameter, key, value)
        sharded: Any = parameter
        # It comes back on the mesh's device, where an offloaded parameter is not.
        return distribute_tensor(
            value, sharded.device_mesh, sharded.placements, src_data_rank=None
        ).to(parameter.device)

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        # Blocks gather their weights when they run; weights outside of blocks are gathered only by
        # the whole model's forward.
        self.model.unshard()
        try:
            yield
        finally:
            self.model.reshard()

    def release(self) -> None:
        self.model = self.inner = self.optimizer = None
        self.accelerator.free_memory()


def _blocks(model: VisionLanguageNetwork) -> list[tuple[nn.Module, bool]]:
    """The blocks of the tower and the language model, and whether their weights may be cast.

    A tower with running statistics, whose weights may not be, is one more block after its own: the
    weights outside of its blocks would be cast with the whole model's.
    """
    blocks: list[tuple[nn.Module, bool]] = []
    for part, module in parts(model).items():
        if part == "connector":
            continue
        castable = all(getattr(layer, "running_mean", None) is None for layer in module.modules())
        # A small part without blocks is sharded with the whole model.
        with contextlib.suppress(ModelError):
            names = block_names(module)
            blocks += [(module.get_submodule(name), castable) for name in names]
        if not castable:
            blocks.append((module, castable))
    if model.similarity is not None:
        blocks.append((model.similarity, False))
    return blocks
