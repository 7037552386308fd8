"""The vision-language model: tower, connector, LLM; readable in one sitting.

Shapes: B rows, L tokens, U distinct media of a batch, M media places, N tokens a media item, D tower width, E LLM width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.functional import normalize

from vlm_tune.config.base import Config
from vlm_tune.config.model import Llm, ModelSection
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.types import IGNORE_INDEX, Batch
from vlm_tune.errors import DataError, ModelError
from vlm_tune.model.base_places import Base
from vlm_tune.model.connectors.instruction import Text, instructions, places
from vlm_tune.model.connectors.projectors import Connector
from vlm_tune.model.language.base import LanguageModel, TokenLoss
from vlm_tune.model.vision.base import VisionTower
from vlm_tune.model.weights import is_sharded


class VisionLanguageConfig(Config):
    """What `config.json` holds: all that makes the model again, weights apart; `precision` is what it is loaded in."""

    model_type: str = "vlm_tune"
    model: ModelSection
    tower_rebuild: dict[str, Any]
    template: dict[str, Any]
    system: str | None
    max_length: int
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"

    @property
    def llm(self) -> Llm:
        """The language model's section."""
        return self.model.llm


@dataclass
class Alignment:
    """Unit vectors in the LLM's embedding space: image fp32[B, E] and caption fp32[B, E] of each row."""

    images: torch.Tensor
    captions: torch.Tensor


class VisionLanguageNetwork(nn.Module):
    """A vision tower whose features a connector projects into a language model.

    `changed` names the parts (tower, llm) whose base weights are no longer those of their name in the recipe;
    `adapters` holds the LoRA tuner of each part that has one; `bases` are the fingerprints of the weights that parts started from.
    `beside` names the LLM's own weights that were trained where all others are still its base's.
    """

    def __init__(
        self,
        config: VisionLanguageConfig,
        tower: VisionTower,
        connector: Connector,
        llm: LanguageModel,
        processor: Processor,
    ) -> None:
        super().__init__()
        self.config = config
        self.processor = processor
        self.tower = tower
        self.connector = connector
        self.llm = llm
        self.changed: set[str] = set()
        self.beside: set[str] = set()
        self.adapters: dict[str, Any] = {}
        self.bases: dict[str, Base] = {}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> VisionLanguageNetwork:
        """As in torch, but a frozen tower stays in eval mode, so its batch statistics don't move."""
        super().train(mode)
        if mode and not any(parameter.requires_grad for parameter in self.tower.parameters()):
            self.tower.eval()
        return self

    def media(self, batch: Batch) -> torch.Tensor | None:
        """Connected features [M, N, E] of the batch's media places, in row order; None where it has none."""
        if batch.features is None and batch.pixels is None:
            return None
        features = self.tower(batch.pixels) if batch.features is None else batch.features
        if not self.connector.needs_text:
            return self.connector(features)[batch.media_index]
        where = places(batch, self.processor.spec.tokens_per_image)
        return self.connector(features[batch.media_index], self._text(batch, *where))

    def _text(self, batch: Batch, rows: torch.Tensor, columns: torch.Tensor) -> Text:
        embeds = self.llm.embed(batch.input_ids)
        return instructions(
            batch, embeds, rows, columns, answers_inside=self.llm.layout == "causal"
        )

    def _blank(self, batch: Batch) -> torch.Tensor:
        """Connected features [1, N, E] of a black image, for a batch that has none."""
        size = self.tower.image_size
        first = torch.zeros(1, dtype=torch.int64, device=batch.input_ids.device)
        if batch.cached:  # other ranks don't run the tower either
            features = torch.zeros(1, *self.tower.measure(), device=first.device)
        else:
            features = self.tower(
                torch.zeros(1, 3, size, size, dtype=torch.uint8, device=first.device)
            )
        return (
            self.connector(features, self._text(batch, first, first))
            if self.connector.needs_text
            else self.connector(features)
        )

    def embed(self, batch: Batch) -> torch.Tensor:
        """The LLM's input [B, L, E], media joined to the text. Raises `ModelError` if slots and media differ in number."""
        connected = self.media(batch)
        if connected is None and batch.image_mask.any():
            raise ModelError(
                f"{int(batch.image_mask.sum())} image slots and no media in {', '.join(batch.ids)}"
            )
        if connected is None and self.training and self._runs_blank:
            # Every rank must run the same modules, so a batch without media runs a blank one that counts nothing.
            connected = self._blank(batch)
        return self.connector.join(self.llm.embed(batch.input_ids), connected, batch)

    @property
    def _runs_blank(self) -> bool:
        """Whether other ranks wait for what a batch without media would leave out: its gradients, or its share of weights."""
        found = (
            parameter for part in (self.tower, self.connector) for parameter in part.parameters()
        )
        return any(parameter.requires_grad or is_sharded(parameter) for parameter in found)

    def forward(self, batch: Batch, *, align: bool = False) -> TokenLoss | Alignment:
        """The language modelling loss of a batch, or with `align` its images and captions as vectors."""
        if align:
            return self._align(batch)
        return self.llm(self.embed(batch), batch)

    def _align(self, batch: Batch) -> Alignment:
        connected = self.media(batch)
        if connected is None or len(batch.media_index) != len(batch.ids):
            raise DataError("a contrastive objective needs exactly one image a row")
        said = batch.labels != IGNORE_INDEX
        for stop in self.processor.stop_ids:
            said &= batch.labels != stop
        words = self.llm.embed(batch.labels.clamp(min=0)).float() * said[..., None]
        return Alignment(
            normalize(connected.float().mean(1), dim=-1),
            normalize(words.sum(1), dim=-1),
        )


Network = TypeVar("Network", bound=VisionLanguageNetwork)
"""The class that a function which makes a model is asked for."""
