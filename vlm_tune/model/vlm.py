"""The forward pass of a vision-language model: tower, connector, splice into the text, LLM.

The tower may also be one of audio: what it takes is called pixels here.

Shapes: B rows, L tokens, U distinct media of a batch, M media places, N tokens of a media item,
D tower width, E LLM width.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, Literal, ParamSpec, Self, TypeVar

import torch
from torch import nn
from torch.nn.functional import normalize

from vlm_tune.config.base import Config
from vlm_tune.config.model import Llm, SavedSection
from vlm_tune.data.batch import Batch
from vlm_tune.data.chat.processor import Processor
from vlm_tune.data.types import IGNORE_INDEX
from vlm_tune.errors import DataError, ModelError
from vlm_tune.model.base_places import Base
from vlm_tune.model.connectors.instruction import Text, instructions, places
from vlm_tune.model.connectors.layers import matched
from vlm_tune.model.connectors.projectors import Connector
from vlm_tune.model.image_noise import noised
from vlm_tune.model.language.base import (
    AnswerLogprobs,
    LanguageModel,
    SupervisedLogprobs,
    TokenLoss,
)
from vlm_tune.model.media_tower import MediaTower
from vlm_tune.model.similarity import Similarity
from vlm_tune.model.task_sharing import TaskSharing
from vlm_tune.model.weights import is_sharded
from vlm_tune.precision import autocast_dtype
from vlm_tune.quoting import name_list


class VisionLanguageConfig(Config):
    """The content of `config.json`: all that is needed to rebuild the model, except its weights.

    `precision` is the dtype in which it is loaded by default.
    """

    model_type: str = "vlm_tune"
    model: SavedSection
    tower_rebuild: dict[str, Any]
    template: dict[str, Any]
    system: str | None
    max_length: int
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"

    @property
    def llm(self) -> Llm:
        """The recipe's section `model.llm`."""
        return self.model.llm


@dataclass
class Alignment:
    """Unit vectors of each row's image and caption in the LLM's embedding space, fp32[B, E].

    `scale` and `bias`, fp32[1], are those of their similarities, where they are learned. `views`
    are the vectors of the images' second views, where the batch has them.
    """

    images: torch.Tensor
    captions: torch.Tensor
    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    views: torch.Tensor | None = None


_mode_lock = threading.Lock()


class VisionLanguageNetwork(nn.Module):
    """The network: forward pass from pixels and token ids to the loss, and nothing else.

    The tower turns images into features, the connector projects them to the LLM's width, `embed`
    splices them into the text's embeddings, and the LLM computes the loss. Generating answers,
    chat, loading and saving are not here: `vlm_tune.generation.chat.VisionLanguageModel`, the class
    that users work with, adds them.

    Attributes:
        config: the model's config.
        processor: tokenizer, chat template and image processing.
        tower, connector, llm: the parts.
        changed: the parts (tower, llm) whose base weights are no longer those of their name in the
            recipe.
        beside: names of the LLM's weights that were trained individually while the rest is
            unchanged.
        adapters: the LoRA tuner of each part that has one.
        sharing: how tasks share the LLM's adapter, if they have adapters of their own.
        bases: fingerprints of the weights that parts started from.
        similarity: the learned scale of similarities between images and captions, or None.
    """

    _evaluations = 0
    _trained: Sequence[nn.Module] = ()

    def __init__(
        self,
        config: VisionLanguageConfig,
        tower: MediaTower,
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
        self.sharing: TaskSharing | None = None
        self.bases: dict[str, Base] = {}
        self.similarity: Similarity | None = None

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> VisionLanguageNetwork:
        """Sets the mode as in torch, but a frozen tower stays in eval mode.

        So its batch statistics do not change.
        """
        super().train(mode)
        if mode and not any(parameter.requires_grad for parameter in self.tower.parameters()):
            self.tower.eval()
        return self

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context in which the model is in eval mode, for as long as any thread is in it.

        If the model is in eval mode already, no module's flag is written, so that concurrent
        threads never see it change.
        """
        with _mode_lock:
            if not self._evaluations:
                self._trained = [module for module in self.modules() if module.training]
                if self._trained:
                    self.eval()
            self._evaluations += 1
        try:
            yield
        finally:
            with _mode_lock:
                self._evaluations -= 1
                if not self._evaluations:
                    for module in self._trained:
                        module.training = True
                    self._trained = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy that no thread evaluates."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__ = {
            name: copy.deepcopy(value, memo)
            for name, value in self.__dict__.items()
            if name not in ("_evaluations", "_trained")
        }
        return copied

    def media(self, batch: Batch, image_noise: float = 0.0) -> torch.Tensor | None:
        """The connector's outputs [M, N, E] in order of the media places; None without media.

        `image_noise` is as in `forward`.
        """
        if batch.features is None and batch.pixels is None:
            return None
        features = batch.features
        if features is None:
            shapes = () if batch.patch_places is None else (batch.patch_places,)
            features = self.tower(batch.pixels, *shapes)
        features = matched(features, self.connector)
        if not self.connector.needs_text:
            return noised(self.connector(features), image_noise)[batch.media_index]
        where = places(batch.on_host, self.processor.spec.tokens_per_image)
        connected = self.connector(features[batch.media_index], self._text(batch, *where))
        return noised(connected, image_noise)

    def _text(self, batch: Batch, rows: torch.Tensor, columns: torch.Tensor) -> Text:
        """The instructions that a text-conditioned connector reads.

        `rows` and `columns` int64[M], on the host, are the media's places.
        """
        embeds = matched(self.llm.embed(batch.input_ids), self.connector)
        return instructions(
            batch.on_host, embeds, rows, columns, answers_inside=self.llm.layout == "causal"
        )

    def _blank(self, batch: Batch) -> torch.Tensor:
        """The connector's outputs [1, N, E] for a blank input, for a batch without media."""
        device = batch.input_ids.device
        if batch.cached:  # other ranks don't run the tower either
            dtype = autocast_dtype(device) or next(self.tower.parameters()).dtype
            features = torch.zeros(1, *self.tower.measure(), dtype=dtype, device=device)
        else:
            features = self.tower(self.tower.blank(device))
        first = batch.on_host.input_ids.new_zeros(1)
        return (
            self.connector(features, self._text(batch, first, first))
            if self.connector.needs_text
            else self.connector(features)
        )

    def embed(self, batch: Batch, image_noise: float = 0.0) -> torch.Tensor:
        """The LLM's input [B, L, E]: the text's embeddings with the media spliced in.

        Of a native model, which embeds text and media itself, it is the ids [B, L]. `image_noise`
        is as in `forward`. Raises `ModelError` if slots and media differ in number.
        """
        if self.llm.native:
            return batch.input_ids
        connected = self.media(batch, image_noise if self.training else 0.0)
        if connected is None and len(batch.slots):
            raise ModelError(
                f"{len(batch.slots)} image slots and no media in {name_list(batch.ids)}"
            )
        if connected is None and self.training and self._runs_blank:
            # Every rank must run the same modules, so a batch without media runs a blank image that
            # does not count.
            connected = self._blank(batch)
        return self.connector.join(self.llm.embed(batch.input_ids), connected, batch)

    @property
    def _runs_blank(self) -> bool:
        """Whether a batch without media must run the tower and connector for other ranks.

        They wait for its gradients, or for its shards of the weights.
        """
        parameters = (
            parameter for part in (self.tower, self.connector) for parameter in part.parameters()
        )
        return any(parameter.requires_grad or is_sharded(parameter) for parameter in parameters)

    def forward(
        self,
        batch: Batch,
        *,
        align: bool | Literal["prompts"] = False,
        by_answer: bool = False,
        temperature: float | None = None,
        image_noise: float = 0.0,
    ) -> TokenLoss | Alignment | AnswerLogprobs | SupervisedLogprobs:
        """The language modelling loss of a batch.

        With `align` its image and caption vectors; with `align="prompts"` the vectors of its images
        and of the words that tell its prompts apart. With `by_answer` the log-probabilities of its
        answers, with a `temperature` those of its supervised tokens, of logits divided by it. In
        training mode `image_noise` is the largest noise of its images' tokens, see `noised`.
        """
        if align == "prompts":
            return self._align_prompts(batch)
        if align:
            return self._align(batch)
        embeds = self.embed(batch, image_noise)
        return self.llm(embeds, batch, by_answer=by_answer, temperature=temperature)

    def _align(self, batch: Batch) -> Alignment:
        """Mean image features and summed caption embeddings, normalised.

        Raises `DataError` unless each row has exactly one image.
        """
        connected = self.media(batch)
        if connected is None or len(batch.media_index) != len(batch.ids):
            raise DataError("a contrastive objective needs exactly one image per row")
        scale, bias = (None, None) if self.similarity is None else self.similarity()
        images = self.image_vectors(connected, batch.token_counts)
        captions = self.caption_vectors(batch.labels)
        return Alignment(images, captions, scale, bias, self._second_views(batch))

    def _second_views(self, batch: Batch) -> torch.Tensor | None:
        """The vectors fp32[B, E] of the second views of a batch's images, if it has them."""
        if batch.views is None:
            return None
        other = copy.copy(batch)
        other.pixels = batch.views
        connected = self.media(other)
        assert connected is not None
        return self.image_vectors(connected, batch.token_counts)

    def _align_prompts(self, batch: Batch) -> Alignment:
        """Mean features of each row's images, and its words' summed embeddings less the rows' mean.

        So the words that all rows have do not count. All rows have as many images.
        """
        connected = self.media(batch)
        assert connected is not None
        words = self._summed_words(batch.input_ids, batch.attention_mask & ~batch.image_mask)
        images = connected.reshape(len(batch.ids), -1, connected.shape[-1])
        return Alignment(self.image_vectors(images), normalize(words - words.mean(0), dim=-1))

    def _summed_words(self, ids: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        """The summed embeddings fp32[B, E] of the ids int64[B, T] that are `counted`."""
        return (self.llm.embed(ids).float() * counted[..., None]).sum(1)

    def image_vectors(
        self, connected: torch.Tensor, counts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Unit vectors fp32[M, E] of media, by the connector's outputs [M, N, E]: their means.

        `counts` int64[M] are the tokens of each that are no padding; None where all are.
        """
        shown = self.connector.shown(connected).float()
        if counts is None:
            return normalize(shown.mean(1), dim=-1)
        real = torch.arange(shown.shape[1], device=shown.device) < counts[:, None]
        return normalize((shown * real[..., None]).sum(1), dim=-1)

    def caption_vectors(self, labels: torch.Tensor) -> torch.Tensor:
        """Unit vectors fp32[B, E] of captions: the sums of the embeddings of labels int64[B, T].

        Ids that end an answer do not count. A caption without others has a vector of zeros.
        """
        caption_mask = labels != IGNORE_INDEX
        for stop in self.processor.stop_ids:
            caption_mask &= labels != stop
        return normalize(self._summed_words(labels.clamp(min=0), caption_mask), dim=-1)


Network = TypeVar("Network", bound=VisionLanguageNetwork)
"""The class of the model that a function builds or loads."""


Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")


def in_eval_mode(
    function: Callable[Concatenate[VisionLanguageNetwork, Arguments], Returned],
) -> Callable[Concatenate[VisionLanguageNetwork, Arguments], Returned]:
    """Makes a function of a model run in that model's eval mode (`evaluating`)."""

    @wraps(function)
    def evaluates(
        model: VisionLanguageNetwork, *args: Arguments.args, **named: Arguments.kwargs
    ) -> Returned:
        with model.evaluating():
            return function(model, *args, **named)

    return evaluates
