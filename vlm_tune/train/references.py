"""The reference model of preferences and rewards, which is the model before its training.

Its log-probabilities are those of the same modules with other weights, or were stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlm_tune.config.objective_rules import CONTINUED
from vlm_tune.config.recipe import Recipe
from vlm_tune.data.batch import Batch
from vlm_tune.errors import ModelError, TrainingError
from vlm_tune.model.lora import adapters_off
from vlm_tune.model.optimizer_groups import Tuned
from vlm_tune.model.vlm import VisionLanguageNetwork
from vlm_tune.quoting import reason_of
from vlm_tune.train.engines.base import named_parameters


class ReferenceModel(Protocol):
    """Log-probabilities of answers under the reference model."""

    def __call__(self, model: Any, batch: Batch, temperature: float | None = None) -> Tensor:
        """The log-probabilities fp32[A] of a batch's answers, without a gradient.

        Args:
            model: The engine's model, by which every forward pass goes.
            batch: The batch.
            temperature: Where given, the log-probabilities fp32[S] of the answers' tokens are
                returned, of logits that are divided by it.
        """
        ...


@torch.no_grad()
def _logprobs(
    model: Any, batch: Batch, temperature: float | None, weights: AbstractContextManager[None]
) -> Tensor:
    """The log-probabilities of a batch's answers or tokens, with the weights of a context."""
    with weights:
        logprobs = (
            model(batch, by_answer=True).sums
            if temperature is None
            else model(batch, temperature=temperature).logprobs
        )
    # Autocast keeps casts of trained weights, made here without a gradient, or of other values.
    torch.clear_autocast_cache()
    return logprobs


class AdapterOff:
    """The model with its LoRA adapters switched off, where nothing else trains."""

    def __init__(self, network: VisionLanguageNetwork) -> None:
        self.network = network

    def __call__(self, model: Any, batch: Batch, temperature: float | None = None) -> Tensor:
        return _logprobs(model, batch, temperature, adapters_off(self.network))


class StartCopy:
    """The model with the values that its trained weights had at the start."""

    def __init__(self, network: VisionLanguageNetwork, start: dict[str, Tensor]) -> None:
        """Takes the model, and the trained parameters' values at the start by name."""
        self.network = network
        self.start = start

    def __call__(self, model: Any, batch: Batch, temperature: float | None = None) -> Tensor:
        return _logprobs(model, batch, temperature, self._at_start())

    @contextmanager
    def _at_start(self) -> Iterator[None]:
        """Context in which the trained parameters have their values of the start.

        They are written into place: kernels and compiled code know the weights by their addresses.
        """
        parameters = dict(named_parameters(self.network))
        trained = {name: parameters[name] for name in self.start}
        self.start = {name: start.to(trained[name]) for name, start in self.start.items()}
        now = {name: each.detach().clone() for name, each in trained.items()}
        _fill(trained, self.start)
        try:
            yield
        finally:
            _fill(trained, now)


@torch.no_grad()
def _fill(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


class Precomputed:
    """The log-probabilities that were computed before training, and came with the batch.

    They are those of whole answers.
    """

    def __call__(self, model: Any, batch: Batch, temperature: float | None = None) -> Tensor:
        if batch.reference is None:
            raise TrainingError(f"no log-probabilities of the reference model for {batch.ids}")
        return batch.reference


def check_adapters_off(
    model: VisionLanguageNetwork, recipe: Recipe, earlier: Mapping[str, Any]
) -> None:
    """Raises `ModelError` if adapters to be switched off continue from an earlier stage.

    Args:
        model: The model with the stage's adapters, before their training.
        recipe: The stage's recipe.
        earlier: The adapters of its parts before the stage's rules were applied.
    """
    if recipe.objective.reference_model == "adapter_off" and any(
        model.adapters[part] is adapter
        for part, adapter in earlier.items()
        if part in model.adapters
    ):
        raise ModelError(f"objective.reference: {CONTINUED}")


START = "reference.safetensors"
"""File of a stage's folder: the values that what trains had at the start, for a copy of them."""


def reference_model(
    model: VisionLanguageNetwork, recipe: Recipe, tuned: Tuned, stage: Path, *, resumed: bool
) -> ReferenceModel | None:
    """The reference model of a stage's objective; None where it has none.

    Args:
        model: The model before an engine takes it.
        recipe: The stage's recipe.
        tuned: What trains.
        stage: The stage's folder, which holds the start values of a copy.
        resumed: Whether the stage continues from a checkpoint.

    Raises:
        TrainingError: The start values of a resumed stage are lost.
    """
    match recipe.objective.reference_model:
        case "adapter_off":
            return AdapterOff(model)
        case "precomputed":
            return Precomputed()
        case "copy":
            if resumed:
                return StartCopy(model, read_start(stage))
            parameters = dict(named_parameters(model))
            start = {
                name: parameters[name].detach().to("cpu", copy=True)
                for group in tuned.names
                for name in group
            }
            if PartialState().is_main_process:
                write_start(stage, start)
            return StartCopy(model, start)
    return None


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Context without dropout, whose noise would change how likely a model finds an answer.

    As in TRL's trainers of preferences.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    shares = [layer.p for layer in layers]
    for layer in layers:
        layer.p = 0.0
    try:
        yield
    finally:
        for layer, share in zip(layers, shares, strict=True):
            layer.p = share


def write_start(stage: Path, start: dict[str, Tensor]) -> None:
    """Writes the start values to a stage's folder, where a resumed run reads them."""
    stage.mkdir(parents=True, exist_ok=True)
    temporary = stage / f"{START}.tmp"
    save_file({name: value.contiguous() for name, value in start.items()}, temporary)
    temporary.replace(stage / START)


def read_start(stage: Path) -> dict[str, Tensor]:
    """Reads what `write_start` wrote. Raises `TrainingError` if it is lost or damaged."""
    path = stage / START
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{path}: {reason_of(error)}. It holds the weights before this stage, which answers "
            "are compared with (objective.reference: copy): start the run again with --overwrite"
        ) from None
