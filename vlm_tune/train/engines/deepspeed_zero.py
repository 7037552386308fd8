"""DeepSpeed's ZeRO: optimizer states, gradients and weights sharded over the processes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from vlm_tune.compat_engines import (
    build_no_shared_memory_op,
    flat_zero_shards,
    link_zero_state,
    zero3_shard_size,
)
from vlm_tune.config.engine import DeepSpeedEngine, shards
from vlm_tune.config.train import TrainSection
from vlm_tune.memory_plan.zero import BUCKET
from vlm_tune.model.acceleration.lora_layers import merge_projections
from vlm_tune.model.acceleration.sharded_4bit import replace_4bit_layers
from vlm_tune.model.optimizer_groups import Tuned
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.train.engines.base import (
    MOMENTS,
    Engine,
    Filled,
    State,
    by_parameter,
    fill_buffers,
)


class DeepSpeed(Engine):
    """DeepSpeed's ZeRO: shards optimizer states (stage 1), gradients (2) and weights (3).

    They are offloaded to the CPU if the section says so. DeepSpeed owns the gradients until a step
    is taken and adds to them if it is not. So no step can be skipped: a run ends at the first that
    is not finite.
    """

    skips = False

    def __init__(self, accelerator: Accelerator, section: DeepSpeedEngine) -> None:
        super().__init__(accelerator)
        self.section = section
        self.sharded = shards(section)
        if self.sharded:
            self.uncompiled = (
                "the blocks are not compiled: hooks of ZeRO stage 3 gather each layer's weights"
            )
        self.collects = section.stage > 0

    def prepare(self, model: VisionLanguageNetwork, tuned: Tuned, train: TrainSection) -> None:
        # DeepSpeed prints what it builds to stdout, which is for a command's result.
        with contextlib.redirect_stdout(sys.stderr):
            self._prepare(model, tuned, train)

    def _prepare(self, model: VisionLanguageNetwork, tuned: Tuned, train: TrainSection) -> None:
        import deepspeed

        build_no_shared_memory_op()
        self.inner = model
        self.names = tuned.names
        self.rates = [group["lr"] for group in tuned.groups]
        config = self._config(
            train, sum(parameter.numel() for group in tuned.groups for parameter in group["params"])
        )
        if self.sharded:
            replace_4bit_layers(model)
            fill_buffers(model, self.accelerator.device)
            deepspeed.zero.Init(
                module=Filled(model, self.accelerator.device), config_dict_or_path=config
            )
            # The head is gathered when it runs, so it must run equally often on every rank.
            model.llm.whole_head = True
        for parameter in model.parameters():
            # DeepSpeed sends bytes in memory order, which is another order for channels-last
            # weights.
            parameter.data = parameter.data.contiguous()
        self.model, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=self._adamw(tuned.groups, train), config=config
        )
        if self.section.stage:
            self._start_state()
        if not self.sharded:
            merge_projections(model)

    def _config(self, train: TrainSection, trained: int) -> dict[str, Any]:
        """DeepSpeed's configuration for `trained` trained values; the recipe's keys override it."""
        section = self.section
        # By default DeepSpeed allocates two gigabytes of communication buckets, however few values
        # there are; this size is enough for any link.
        zero: dict[str, Any] = {
            "stage": section.stage,
            "reduce_bucket_size": min(trained, BUCKET // 4),
        }
        zero |= {
            f"offload_{'param' if what == 'parameters' else what}": {"device": "cpu"}
            for what in section.offload
        }
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": train.max_grad_norm or 0.0,
            "zero_optimization": zero | section.config.get("zero_optimization", {}),
            # Our AdamW stays: it needs no compiler, and its state is that of the other engines.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            # Weights have their dtypes already, and nothing may be sent in lower precision.
            "torch_autocast": {
                "enabled": train.precision != "fp32",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            },
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
        """Creates the optimizer's state before the first step.

        DeepSpeed links parameters to the state that the first group's step created.
        """
        for share in flat_zero_shards(self.optimizer, self.section.stage):
            moments = {key: torch.zeros_like(share, requires_grad=False) for key in MOMENTS}
            self.optimizer.optimizer.state[share] = {
                "step": torch.zeros((), device=share.device),
                **moments,
            }

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
                state |= {
                    f"{name}|{key}": value.cpu()
                    for key, value in moments.items()
                    if value is not None
                }
        return state

    def load_optimizer_state(self, state: State) -> None:
        if self.section.stage == 0:
            super().load_optimizer_state(state)
            return
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        saved = by_parameter(state)
        for entry in self.optimizer.optimizer.state.values():
            entry["step"].copy_(next(iter(saved.values()))["step"])
        if not self.sharded:
            link_zero_state(self.optimizer)
        for name, parameter in self._named():
            for key in MOMENTS:
                value = saved[name][key].float()
                if not self.sharded:
                    safe_set_full_optimizer_state(parameter, value, key)
                    continue
                # The last rank's shard is padded, which DeepSpeed's function to set a full value
                # does not handle.
                size = zero3_shard_size(parameter)
                padded = nn.functional.pad(
                    value.flatten(), (0, size * self.accelerator.num_processes - value.numel())
                )
                safe_set_local_optimizer_state(
                    parameter, padded.narrow(0, size * self.accelerator.process_index, size), key
                )

    def release(self) -> None:
        self.model.destroy()
        self.model = self.inner = self.optimizer = None
        self.accelerator.free_memory()
